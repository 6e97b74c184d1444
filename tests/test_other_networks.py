"""Networks that nobody here wrote: every width is cut exactly, or stays and is named.

The reference is the whole network with the units that go left out: what they own is zero, and a
LayerNorm's statistics are those of the channels that stay.
"""

import copy
import math
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tdmpc_prune.pruning import (
    Computation,
    SurgeryError,
    UnknownOperation,
    commit,
    find_groups,
    rules,
    tag,
)
from tests.commands import ROOT
from tests.pruning_zoo import NormedLinear, SimNorm
from tests.test_surgery import make_plan as plan_of


def whole_without(net, structure, removed):
    """A copy that computes what is to be left after the cut."""
    net = copy.deepcopy(net)
    norms = {name: part for name, part in net.named_modules() if isinstance(part, nn.LayerNorm)}
    tensors = dict(net.named_parameters(remove_duplicate=False))
    tensors |= dict(net.named_buffers(remove_duplicate=False))
    for group in structure.groups:
        for s in group.slices:
            gone = s.index[np.isin(s.unit, removed.get(group.name, []))]
            module, _, kind = s.tensor.rpartition(".")
            if module in norms and kind == "weight" and len(gone):
                kept = np.setdiff1d(np.arange(norms[module].normalized_shape[-1]), gone)
                norms[module].forward = partial(norm_of_kept, norms[module], torch.tensor(kept))
            tensors[s.tensor].data.index_fill_(s.dim, torch.tensor(gone), 0.0)
    return net


def norm_of_kept(norm, kept, x):
    own = F.layer_norm(x[..., kept], (len(kept),), norm.weight[kept], norm.bias[kept], norm.eps)
    return torch.zeros_like(x).index_copy(-1, kept, own)


def outputs(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for part in found for tensor in outputs(part)] if found is not None else []


def check(net, run, *inputs, expected=None, seed=0):
    """Cut each group by itself and all together; returns the structure before.

    Args:
        net: tagged here.
        run: (network, *inputs) → outputs.
        inputs: real ones.
        expected: the widths that there must be.
        seed: of the units that go.
    """
    net = tag(net.eval(), "net")
    empty = [torch.empty_like(x, device="meta") for x in inputs]

    def computation(network):
        return Computation({"net": network}, lambda on: run(on["net"], *empty))

    structure = find_groups(computation(net))
    if expected is not None:
        assert structure.widths == expected, structure.table()
    rng = np.random.default_rng(seed)
    every = {
        name: sorted(rng.choice(width, max(1, width // 3), replace=False).tolist())
        for name, width in structure.widths.items()
    }
    for removed in [{name: units} for name, units in every.items()] + [every] * (len(every) > 1):
        reference, narrow = whole_without(net, structure, removed), copy.deepcopy(net)
        commit(plan_of(structure, removed), structure, computation(narrow))
        assert size(narrow) < size(net)
        with torch.no_grad():
            both = (outputs(run(on, *inputs)) for on in (reference, narrow))
            for wanted, found in zip(*both, strict=True):
                assert torch.allclose(wanted, found, atol=1e-5), removed
    return structure


def size(net):
    return sum(parameter.numel() for parameter in net.parameters())


def randomised(net):
    """Biases and norms of no special value, so that nothing is hidden by zeros and ones."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


# --- Stable-Baselines3 -------------------------------------------------------------------------


def sb3(name, **more):
    kinds = pytest.importorskip("stable_baselines3")
    torch.manual_seed(0)
    arch = {"policy_kwargs": {"net_arch": [16, 12]}, "device": "cpu"}
    return getattr(kinds, name)("MlpPolicy", "Pendulum-v1", **arch, **more)


@pytest.mark.parametrize("name", ["SAC", "TD3"])
def test_actors_and_critics_of_sb3(name):
    model, observation, action = sb3(name), torch.randn(5, 3), torch.rand(5, 1)
    net = randomised(model.policy)
    more = {"deterministic": True} if name == "SAC" else {}
    widths = check(net.actor, lambda on, x: on(x, **more), observation).widths
    assert sorted(widths.values()) == [12, 16]
    widths = check(net.critic, lambda on, x, a: on(x, a), observation, action).widths
    assert sorted(widths.values()) == [12, 12, 16, 16]


def test_an_sb3_agent_acts_on_after_the_cut():
    model, empty = sb3("SAC"), torch.empty(5, 3, device="meta")
    actor = tag(model.policy.actor, "actor")
    computation = Computation({"actor": actor}, lambda on: on["actor"](empty))
    structure = find_groups(computation)
    removed = {name: [0, 1] for name in structure.widths}
    commit(plan_of(structure, removed), structure, computation, [actor.optimizer])
    action, _ = model.predict(np.zeros(3, np.float32), deterministic=True)
    assert action.shape == (1,) and actor.latent_pi[0].out_features == 14


def test_a_policy_of_ppo():
    net = randomised(sb3("PPO").policy)

    def run(on, x, a):
        return *on.evaluate_actions(x, a)[:2], on.get_distribution(x).distribution.mean

    structure = check(net, run, torch.randn(5, 3), torch.rand(5, 1))
    assert sorted(structure.widths.values()) == [12, 12, 16, 16]


# --- Shaped like TD-MPC2 -----------------------------------------------------------------------


class StackedQ(nn.Module):
    """Five functions as stacked tensors, each Linear, LayerNorm, Mish, Linear."""

    def __init__(self, inputs, hidden, members=5):
        super().__init__()
        self.first = nn.Parameter(torch.randn(members, inputs, hidden) / math.sqrt(inputs))
        self.first_bias = nn.Parameter(torch.randn(members, 1, hidden))
        self.second = nn.Parameter(torch.randn(members, hidden, 1) / math.sqrt(hidden))

    def forward(self, x):
        x = x.expand(len(self.first), -1, -1)
        return torch.bmm(F.mish(torch.baddbmm(self.first_bias, x, self.first)), self.second)


class World(nn.Module):
    def __init__(self, members):
        super().__init__()
        joint = 16 + 2
        self.encoder = nn.Sequential(NormedLinear(3, 20), nn.Linear(20, 16), SimNorm(8))
        self.dynamics = nn.Sequential(NormedLinear(joint, 24), nn.Linear(24, 16), SimNorm(8))
        self.reward = nn.Sequential(NormedLinear(joint, 14), nn.Linear(14, 5))
        self.policy = nn.Sequential(NormedLinear(16, 10), nn.Linear(10, 4))
        self.q = members(joint)

    def forward(self, observation, action):
        latent, found = self.encoder(observation), []
        for _ in range(2):
            joint = torch.cat([latent, action], -1)
            found += [self.reward(joint), self.q(joint), self.policy(latent)]
            latent = self.dynamics(joint)
        return found


class ListedQ(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(NormedLinear(inputs, 12), nn.Linear(12, 1)) for _ in range(5)
        )

    def forward(self, x):
        return torch.stack([member(x) for member in self.members])


@pytest.mark.parametrize("members", [lambda joint: StackedQ(joint, 12), ListedQ])
def test_a_network_shaped_like_tdmpc2(members):
    torch.manual_seed(0)
    net = randomised(World(members))
    widths = check(net, lambda on, x, a: on(x, a), torch.randn(4, 3), torch.randn(4, 2)).widths
    # The latent goes by whole blocks of 8: two units.
    assert [w for name, w in widths.items() if name == "encoder.1+dynamics.1"] == [2]
    assert widths["encoder.0"] == 20 and widths["policy.0"] == 10
    assert list(widths.values()).count(12) == (1 if isinstance(net.q, StackedQ) else 5)


class VmappedQ(nn.Module):
    """As the public code stacks them: `vmap` over the parameters of one of them."""

    def __init__(self, inputs):
        super().__init__()
        own = [nn.Sequential(nn.Linear(inputs, 12), nn.Mish(), nn.Linear(12, 1)) for _ in range(5)]
        stacked, _ = torch.func.stack_module_state(own)
        self.stacked = nn.ParameterDict({n.replace(".", "_"): p for n, p in stacked.items()})
        self.__dict__["one"] = own[0].to("meta")

    def forward(self, x):
        values = {name.replace("_", "."): value for name, value in self.stacked.items()}
        return torch.vmap(lambda own: torch.func.functional_call(self.one, own, (x,)))(values)


def test_functions_under_vmap_are_cut():
    torch.manual_seed(0)
    net = randomised(VmappedQ(5))
    check(net, lambda on, x: on(x), torch.randn(4, 5), expected={"stacked": 12})


# --- Recurrent -------------------------------------------------------------------------------


class HandMadeGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.out = nn.Linear(4, 9), nn.Linear(9, 2)
        self.gates, self.new = nn.Linear(4 + 9, 18), nn.Linear(4 + 9, 9)

    def forward(self, x):
        h = torch.tanh(self.start(x[:, 0]))
        for t in range(x.shape[1]):
            reset, update = torch.sigmoid(self.gates(torch.cat([x[:, t], h], -1))).chunk(2, -1)
            new = torch.tanh(self.new(torch.cat([x[:, t], reset * h], -1)))
            h = (1 - update) * new + update * h
        return self.out(h)


def test_a_gru_made_of_linear_layers_says_why_it_stays():
    torch.manual_seed(0)
    structure = check(HandMadeGRU(), lambda on, x: on(x), torch.randn(3, 5, 4), expected={})
    assert any("'gates' (18 units): aten.split" in why for why in structure.why_fixed())


class Recurrent(nn.Module):
    """Torch's own cell or layer between two Linear layers."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 10), nn.Linear(9, 2)
        more = {} if kind.__name__.endswith("Cell") else {"batch_first": True}
        self.memory = kind(10, 9, **more)

    def forward(self, x):
        seen = torch.relu(self.inner(x))
        if not isinstance(self.memory, nn.RNNCellBase):
            return self.out(self.memory(seen)[0])
        state = None
        for t in range(x.shape[1]):
            state = self.memory(seen[:, t], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN, nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_torchs_recurrent_layers_stay_and_those_before_are_cut(kind):
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, 4)
    structure = check(Recurrent(kind), lambda on, x: on(x), inputs, expected={"inner": 10})
    assert any(why.startswith("'memory'") for why in structure.why_fixed())


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTMCell])
def test_recurrent_layers_know_the_size_of_what_they_read(kind):
    net, empty = tag(Recurrent(kind), "net"), torch.empty(3, 5, 4, device="meta")
    computation = Computation({"net": net}, lambda on: on["net"](empty))
    structure = find_groups(computation)
    commit(plan_of(structure, {"inner": [1, 2, 3]}), structure, computation)
    assert net.memory.input_size == 7


# --- Attention, gates, shared weights ---------------------------------------------------------


class Heads(nn.Module):
    """Attention with heads, as most write it."""

    def __init__(self, heads=4, size=6):
        super().__init__()
        self.heads, self.size = heads, size
        self.inner = nn.Linear(5, 16)
        self.qkv, self.out = nn.Linear(16, 3 * heads * size), nn.Linear(heads * size, 2)

    def forward(self, x):
        x = torch.relu(self.inner(x))
        batch, steps, _ = x.shape
        q, k, v = self.qkv(x).view(batch, steps, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(self.size)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, steps, -1))


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.first, self.out, self.gate = nn.Linear(5, 24), nn.Linear(12, 2), gate

    def forward(self, x):
        return self.out(self.gate(self.first(x)))


class Tied(nn.Module):
    """A decoder that has the encoder's weights, the other way round."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 10)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.mT, self.bias)


class Twice(nn.Module):
    """One layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(torch.relu(self.shared(torch.relu(self.shared(self.first(x))))))


class SharedParameter(nn.Module):
    """Two layers that hold the same parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(5, 8)
        self.second.weight = self.first.weight
        self.out = nn.Linear(16, 2)

    def forward(self, x):
        return self.out(torch.cat([self.first(x).relu(), self.second(x + 1).tanh()], -1))


@pytest.mark.parametrize(
    ("net", "shape", "widths", "named"),
    [
        (Heads(), (3, 7, 5), {"inner": 16}, "'qkv' (72 units): aten.unbind"),
        (Gated(lambda h: F.silu(h[..., :12]) * h[..., 12:]), (4, 5), {}, "(24 units): aten.slice"),
        (Gated(lambda h: math.prod(h.chunk(2, -1))), (4, 5), {}, "(24 units): aten.split"),
        (Gated(lambda h: h[..., ::2] * h[..., 1::2]), (4, 5), {}, "(24 units): aten.slice"),
        (Gated(lambda h: h.unflatten(-1, (-1, 2)).amax(-1)), (4, 5), {"first": 12}, ""),
        (Tied(), (4, 6), {"encoder": 10}, ""),
        (Twice(), (4, 5), {"first+shared": 8}, ""),
        (SharedParameter(), (4, 5), {"first": 8}, ""),
    ],
    ids=["heads", "swiglu", "chunks", "interleaved", "maxout", "tied", "twice", "shared"],
)
def test_what_is_split_or_shared_is_cut_exactly_or_named(net, shape, widths, named):
    torch.manual_seed(0)
    inputs = torch.randn(*shape)
    structure = check(randomised(net), lambda on, x: on(x), inputs, expected=widths)
    assert any(named in why for why in structure.why_fixed())


def test_sizes_that_the_program_spells_out_are_refused_at_the_cut():
    net = Gated(lambda h: h.unflatten(-1, (12, 2)).amax(-1))
    with pytest.raises(SurgeryError, match="'first' cannot be cut, and nothing was"):
        check(net, lambda on, x: on(x), torch.randn(4, 5))


def test_an_operation_without_a_rule_is_refused_by_name():
    net, empty = tag(Gated(F.glu), "net"), torch.empty(4, 5, device="meta")
    with pytest.raises(
        UnknownOperation, match=r"aten\.glu\.default on a prunable channel"
    ) as error:
        find_groups(Computation({"net": net}, lambda on: on["net"](empty)))
    assert "\n" not in str(error.value)


# --- The page ----------------------------------------------------------------------------------

PAGE = ROOT / ".readme/own-networks.md"


def test_the_example_of_the_page_runs(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len([line for line in block.splitlines() if line.strip()]) == 15
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert names["net"][0].out_features < 64
    assert names["groups"].widths == names["plan"].widths_after
    assert "policy" in capsys.readouterr().out


def test_the_page_names_every_operation_that_has_a_rule():
    table = PAGE.read_text().split("## Operations")[1].split("## Networks tried")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row)}
    assert set(rules._RULES) <= named


def test_pruning_needs_neither_hydra_nor_a_simulator():
    program = "import sys, tdmpc_prune.pruning as p; [getattr(p, n) for n in p.__all__]; print("
    program += "[m for m in ('hydra', 'omegaconf', 'mujoco', 'gymnasium') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.stdout == b"[]\n", done.stderr
