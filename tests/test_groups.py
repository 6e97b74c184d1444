"""Groups by tracing: the twelve cases that general libraries get wrong, operations, counts."""

import copy
import io
import json
import re
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.config import PRESETS
from tdmpc_prune.agent.learner import Learner
from tdmpc_prune.agent.planner import planning_macs
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation, tag
from tdmpc_prune.pruning import tracing
from tdmpc_prune.pruning.allocation import make_plan
from tdmpc_prune.pruning.config import ALLOCATIONS, PruneConfig
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.rules import UnknownOperation
from tdmpc_prune.pruning.surgery import SurgeryError, commit
from tdmpc_prune.saving.agents import load_agent, save_agent
from tests.commands import REACH, run
from tests.pruning_zoo import NormedLinear, SimNorm, Stacked
from tests.small import AGENT
from tests.test_surgery import make_plan as plan_of


def widths_of(module, run, shape=(3, 5)):
    """Groups of one module whose outputs leave it."""
    return find_groups(one(module, run, shape)).widths


def one(module, run=None, shape=(3, 5)):
    """The computation of one module on one input."""
    for name, part in module.named_children():
        if not hasattr(part, "component"):
            tag(part, name)
    if not hasattr(module, "component"):
        module.component = "module"
    call = run or (lambda m, x: m(x))
    return Computation(
        {"model": module},
        lambda networks: call(networks["model"], torch.zeros(shape, device="meta")),
    )


def cut(ties, removed, optimisers=()):
    structure = find_groups(ties)
    return commit(plan_of(structure, removed), structure, ties, optimisers)


def small_learner(**widths):
    model = WorldModel(
        Widths(
            **{
                "observation": 4,
                "action": 2,
                "latent": 6,
                "encoder": (7,),
                "dynamics": (8, 9),
                "reward": (10, 11),
                "policy": (12, 13),
                "q_ensemble": ((14, 15), (16, 17)),
            }
            | widths
        )
    )
    learner = Learner(model, AGENT.planner, AGENT.learning)
    return learner, agent_computation(model, learner.target, AGENT)


LATENT = "encoder.2+dynamics.4"

# --- ANCHORS: where general pruning libraries fail, one test each -----------------------------


def test_agent_without_a_single_forward():
    learner, ties = small_learner()
    with pytest.raises(NotImplementedError):
        learner.model(torch.zeros(1, 4))
    assert len(find_groups(ties).groups) == 12


def test_one_latent_step_is_not_enough_and_two_tie_encoder_and_dynamics():
    learner, ties = small_learner()
    (latent,) = [group for group in find_groups(ties).groups if group.coupling]
    assert latent.name == LATENT
    owned = {(s.tensor, s.dim) for s in latent.slices if s.network == "model"}
    assert {("encoder.2.weight", 0), ("dynamics.4.weight", 0), ("dynamics.0.weight", 1)} <= owned
    # The same unit is the same index on both sides.
    places = {(s.tensor, s.dim): s for s in latent.slices if s.network == "model"}
    for tensor in ("encoder.2.weight", "dynamics.4.weight"):
        assert places[tensor, 0].index.tolist() == places[tensor, 0].unit.tolist()
    cut(ties, {LATENT: [1, 4]})
    assert learner.model.dynamics[4].out_features == learner.model.encoder[2].out_features == 4


def test_policy_that_reads_a_detached_latent():
    learner, ties = small_learner()
    (latent,) = [group for group in find_groups(ties).groups if group.coupling]
    assert ("policy.0.weight", 1) in {(s.tensor, s.dim) for s in latent.slices}
    cut(ties, {LATENT: [0]})
    assert learner.model.act(torch.zeros(1, 5)).shape == (1, 2)


def test_target_networks_are_cut_with_the_online_ones():
    learner, ties = small_learner()
    cut(ties, {name: [0, 3] for name in find_groups(ties).widths})
    shapes = [p.shape for p in learner.model.parameters()]
    assert shapes == [p.shape for p in learner.target.parameters()]
    assert learner.target.widths.q_ensemble == ((12, 13), (14, 15))


def test_target_networks_that_nothing_ties_are_refused():
    _, ties = small_learner()
    alone = Computation(ties.networks, lambda n: [n["model"].encoder(torch.zeros(1, 4).to("meta"))])
    with pytest.raises(UserError, match="takes no part in the traced computation"):
        find_groups(alone)


def test_target_networks_whose_average_is_not_traced_are_refused():
    learner, ties = small_learner()

    def apart(networks):
        x = torch.zeros(1, 4, device="meta")
        return [network.act(network.encode(x)) for network in networks.values()]

    learner.model.reward = learner.model.dynamics = nn.Identity()
    learner.model.q_ensemble = learner.target.q_ensemble = nn.ModuleList()
    learner.target.reward = learner.target.dynamics = nn.Identity()
    with pytest.raises(UserError, match="of network 'target' is tied to nothing in 'model'"):
        find_groups(Computation(ties.networks, apart))


def test_output_heads_are_not_pruned():
    learner, ties = small_learner()
    for group in find_groups(ties).groups:
        for s in group.slices:
            assert (s.tensor, s.dim) not in {
                ("policy.4.weight", 0),
                ("reward.4.weight", 0),
                ("encoder.0.weight", 1),  # observations
            }
    cut(ties, {name: [0] for name in find_groups(ties).widths})
    assert learner.model.widths.action == 2
    assert learner.model.widths.observation == 4
    assert learner.model.dynamics[0].in_features == 5 + 2  # the actions' columns stay


def test_encoder_and_dynamics_cannot_be_given_different_ratios():
    """There is one latent group, so a plan has one number for it."""
    _, ties = small_learner()
    structure = find_groups(ties)
    assert [n for n in structure.widths if "encoder.2" in n or "dynamics.4" in n] == [LATENT]


def test_linear_subclass_that_owns_its_layer_norm_and_activation():
    net = nn.Sequential(NormedLinear(5, 8), nn.Linear(8, 2))
    ties = one(net)
    (group,) = find_groups(ties).groups
    assert {s.tensor for s in group.slices} == {
        "0.weight",
        "0.bias",
        "0.norm.weight",
        "0.norm.bias",
        "1.weight",
    }
    cut(ties, {group.name: [0, 5]})
    assert net[0].norm.normalized_shape == (6,)
    assert net(torch.zeros(3, 5)).shape == (3, 2)


def test_sim_norm_blocks_go_whole():
    net = nn.Sequential(nn.Linear(5, 24), SimNorm(8), nn.Linear(24, 2))
    ties = one(net)
    (group,) = find_groups(ties).groups
    assert group.width == 3
    (rows,) = [s for s in group.slices if (s.tensor, s.dim) == ("0.weight", 0)]
    assert rows.unit.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    weight = net[0].weight.detach().clone()
    cut(ties, {group.name: [1]})
    assert torch.equal(net[0].weight, weight[[*range(8), *range(16, 24)]])
    left = cut(ties, {group.name: [0]})  # a single block is one unit, not eight
    assert sum(left.widths.values()) == 1


@pytest.mark.parametrize("way", ["baddbmm", "vmap", "einsum"])
def test_ensemble_as_stacked_tensors(way):
    """Whole, quickly, and in every member."""

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = Stacked(3, 64, 48)

        def forward(self, x):
            m = self.members
            if way == "baddbmm":
                return m(x)
            if way == "einsum":
                hidden = F.elu(torch.einsum("bi,eih->ebh", x, m.first) + m.first_bias)
                return torch.einsum("ebh,eho->ebo", hidden, m.second) + m.second_bias

            def member(first, first_bias, second, second_bias):
                hidden = F.elu(F.linear(x, first.T, first_bias[0]))
                return F.linear(hidden, second.T, second_bias[0])

            return torch.vmap(member)(m.first, m.first_bias, m.second, m.second_bias)

    net = Ensemble()
    ties, began = one(net, shape=(3, 64)), time.perf_counter()
    (group,) = find_groups(ties).groups
    assert time.perf_counter() - began < 20
    assert group.width == 48
    keep = [unit for unit in range(48) if unit not in (0, 7)]
    first, second = net.members.first.detach().clone(), net.members.second.detach().clone()
    cut(ties, {group.name: [0, 7]})
    assert torch.equal(net.members.first, first[:, :, keep])
    assert torch.equal(net.members.second, second[:, keep])
    assert net.members.first_bias.shape == (3, 1, 46)
    assert net(torch.zeros(2, 64)).shape == (3, 2, 1)


def test_optimiser_holds_the_new_parameters_and_their_moments():
    learner, ties = small_learner()
    for optimiser in learner.optimisers.values():
        for parameter in optimiser.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
        optimiser.step()
    weight = learner.model.reward[2].weight
    before = {k: v.clone() for k, v in learner.optimisers["model_loss"].state[weight].items()}
    optimisers = (optimiser for optimiser in learner.optimisers.values())  # any iterable
    cut(ties, {"reward.0": [2], "reward.2": [0, 10]}, optimisers)
    after = learner.optimisers["model_loss"].state[weight]
    rows, columns = range(1, 10), [0, 1, *range(3, 10)]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[moment], before[moment][rows][:, columns])
    assert after["step"] == before["step"]
    held = {id(p) for o in learner.optimisers.values() for p in o.param_groups[0]["params"]}
    assert held == {id(p) for p in learner.model.parameters()}


def test_saving_needs_no_unsafe_pickling(tmp_path):
    learner, ties = small_learner()
    cut(ties, {name: [1] for name in find_groups(ties).widths})
    save_agent(tmp_path / "agent", Agent(learner.model, AGENT, "cartpole-swingup", 8, {}))
    files = (tmp_path / "agent").iterdir()
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    loaded = load_agent(tmp_path / "agent").model
    assert loaded.widths == learner.model.widths
    for one_, other in zip(loaded.parameters(), learner.model.parameters(), strict=True):
        assert torch.equal(one_, other)


def test_width_that_is_not_a_multiple_of_8():
    """Cut widths are multiples of `round_to`, 8 unless asked otherwise."""
    widths = Widths(5, 1, 50, (256,), (512, 512), (512, 512), (512, 512), ((512, 512),) * 2)
    model = WorldModel(widths)
    structure = find_groups(agent_computation(model, copy.deepcopy(model), PRESETS["paper"].value))
    importance = torch.rand(sum(structure.widths.values())).double().numpy()
    for sparsity in (0.3, 0.77, 0.95):
        for allocation in ALLOCATIONS:
            config = PruneConfig(method="random", allocation=allocation)
            plan = make_plan(structure, importance, config, sparsity, structure.parameters())
            for name, width in plan.widths_after.items():
                assert width % 8 == 0 or width == structure.widths[name]


# --- METHOD.md's counts ------------------------------------------------------------------------


def test_the_published_agent_has_12_groups_one_of_them_coupling():
    config = PRESETS["paper"].value
    model = WorldModel(Widths.dense(config.network, 5, 1))
    structure = find_groups(agent_computation(model, copy.deepcopy(model), config))
    assert len(structure.groups) == 12
    (latent,) = [group for group in structure.groups if group.coupling]
    assert latent.width == 50
    assert structure.per_unit(latent.name)[0] == 3330
    total = sum(structure.parameters().values())
    assert total == sum(p.numel() for p in model.parameters()) == 1_490_024
    assert round(50 * 3330 / total, 3) == 0.112
    assert sum(structure.macs().values()) == planning_macs(model, config.planner)
    assert latent.layers == structure.coupled_layers()
    assert set(latent.layers) == {
        *("encoder.2", "dynamics.0", "dynamics.4", "reward.0", "policy.0"),
        *("q_ensemble.0.0", "q_ensemble.1.0"),
    }


width = st.integers(2, 9)


@settings(max_examples=15, deadline=None)
@given(
    latent=width,
    encoder=st.tuples(width),
    dynamics=st.tuples(width, width),
    policy=st.tuples(width, width),
    members=st.lists(st.tuples(width, width), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 99),
)
def test_sizes_follow_from_widths(latent, encoder, dynamics, policy, members, seed):
    """Parameters and planning MACs that a plan promises are those of the cut agent."""
    learner, ties = small_learner(
        latent=latent, encoder=encoder, dynamics=dynamics, policy=policy, q_ensemble=members
    )
    structure = find_groups(ties)
    chance = torch.Generator().manual_seed(seed)
    removed = {
        name: torch.randperm(n, generator=chance)[
            : int(torch.randint(0, n, (), generator=chance))
        ].tolist()
        for name, n in structure.widths.items()
    }
    plan = plan_of(structure, {name: sorted(units) for name, units in removed.items() if units})
    promised = structure.parameters(plan.widths_after), structure.macs(plan.widths_after)
    commit(plan, structure, ties)
    assert sum(promised[0].values()) == sum(p.numel() for p in learner.model.parameters())
    assert sum(promised[1].values()) == planning_macs(learner.model, AGENT.planner)
    for component in ("encoder", "dynamics", "reward", "policy"):
        part = getattr(learner.model, component)
        assert promised[0][component] == sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize(
    ("fraction", "samples"), [(0.0, 32), (0.05, 19), (0.0, 1), (1.0, 1), (0.05, 20)]
)
def test_a_planner_without_policy_trajectories_has_the_same_groups(fraction, samples):
    planner = replace(
        AGENT.planner, policy_fraction=fraction, samples=samples, elites=min(8, samples)
    )
    learner, usual = small_learner()
    ties = agent_computation(learner.model, learner.target, replace(AGENT, planner=planner))
    structure = find_groups(ties)
    assert structure.widths == find_groups(usual).widths
    assert sum(structure.macs().values()) == planning_macs(learner.model, planner)
    cut(ties, {LATENT: [0, 3], "reward.0": [1]})
    assert learner.model.widths.latent == 4
    assert sum(find_groups(ties).macs().values()) == planning_macs(learner.model, planner)


@pytest.mark.parametrize(
    "setting",
    [
        ("model.planner.policy_fraction=0",),
        ("model.planner.samples=19", "model.planner.elites=4"),
    ],
)
def test_the_command_ends_without_policy_trajectories(tmp_path, setting):
    done = run("groups.py", REACH, *setting, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 groups (1 coupling)" in done.stdout
    assert "'policy.4' (1 units)" not in done.stdout  # a width of 1 is none


# --- Any PyTorch module ------------------------------------------------------------------------


class Convolutional(nn.Module):
    """Encoder and decoder with a flat latent; 8 × 8 pictures."""

    def __init__(self):
        super().__init__()
        self.encoder = tag(
            nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 8, 3, padding=1),
                nn.GroupNorm(2, 8),
                nn.SiLU(),
                nn.Flatten(),
                nn.Linear(8 * 16, 10),
            ),
            "encoder",
        )
        self.decoder = tag(
            nn.Sequential(
                nn.Linear(10, 12 * 4),
                nn.Unflatten(1, (-1, 2, 2)),
                nn.ConvTranspose2d(12, 9, 2, stride=2),
                nn.PReLU(9),
                nn.ConvTranspose2d(9, 1, 2, stride=2),
            ),
            "decoder",
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_convolutions_flattening_and_their_norms():
    net = Convolutional().double().train()
    for _ in range(3):  # running statistics of their own
        net(torch.randn(4, 1, 8, 8).double())
    net.eval()
    ties = Computation(
        {"model": net}, lambda n: n["model"](torch.zeros(2, 1, 8, 8, device="meta").double())
    )
    structure = find_groups(ties)
    widths = {group.name: group.width for group in structure.groups}
    assert widths == {
        "encoder.0": 6,
        "encoder.4": 4,  # pairs: each of the two groups of channels loses as many
        "encoder.8": 10,
        "decoder.0": 12,  # each unit is four columns: a channel's 2 x 2 pixels
        "decoder.2": 9,
    }
    kinds = {group.name: group.kind for group in structure.groups}
    assert [name for name, kind in kinds.items() if kind == "coupling"] == ["encoder.8"]

    x = torch.randn(5, 1, 8, 8).double()
    full = copy.deepcopy(net)
    gone = {"encoder.0": [2], "encoder.4": [0, 3], "encoder.8": [1, 9], "decoder.0": [5, 6]}
    gone["decoder.2"] = [0, 8]

    def silence(module, channels, dim):
        """Zero what the removed channels carry, where the next layer reads them."""
        mask = torch.ones(module.weight.shape[dim]).double()
        mask[channels] = 0

        def hook(_, inputs):
            shape = [1, -1] + [1] * (inputs[0].dim() - 2)
            return (inputs[0] * mask.view(shape),)

        module.register_forward_pre_hook(hook)

    silence(full.encoder[4], [2], 1)
    silence(full.encoder[8], [p for c in (0, 3, 4, 7) for p in range(16 * c, 16 * c + 16)], 1)
    silence(full.decoder[0], [1, 9], 1)
    silence(full.decoder[2], [5, 6], 0)
    silence(full.decoder[4], [0, 8], 0)
    norm = full.encoder[5]
    kept = [[1, 2], [5, 6]]

    def group_norm(_, inputs, output):
        output = output.clone()
        for channels in kept:
            part = inputs[0][:, channels]
            mean = part.mean((1, 2, 3), keepdim=True)
            var = part.var((1, 2, 3), keepdim=True, unbiased=False)
            output[:, channels] = (part - mean) / (var + norm.eps).sqrt()
        return output

    norm.register_forward_hook(group_norm)
    commit(plan_of(structure, gone), structure, ties)
    torch.testing.assert_close(net(x), full(x), rtol=1e-10, atol=1e-12)
    assert net.encoder[1].num_features == 5 and net.encoder[1].running_mean.shape == (5,)
    net.train()(x).sum().backward()  # and it goes on learning


def test_a_hard_coded_size_is_refused_and_nothing_is_cut():
    net = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (3, 4)), nn.Flatten(), nn.Linear(12, 2))
    ties = one(net)
    (group,) = find_groups(ties).groups
    with pytest.raises(SurgeryError, match="the cut network does not run"):
        cut(ties, {group.name: [0]})
    assert net(torch.zeros(1, 5)).shape == (1, 2)
    assert net[0].out_features == 12


def test_norms_without_weights_over_a_width_and_what_is_beside_it():
    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(5, 8)
            self.norm = nn.LayerNorm(13, elementwise_affine=False)
            self.head = nn.Sequential(nn.Linear(13, 12), SimNorm(4))
            self.rms = nn.Sequential(nn.LayerNorm(12, elementwise_affine=False), nn.RMSNorm(12))
            self.out = nn.Linear(12, 2)

        def forward(self, x):
            return self.out(self.rms(self.head(self.norm(torch.cat([self.body(x), x], -1)))))

    net = Joint()
    cut(one(net), {"body": [0, 7], "head.0": [1]})
    assert net.norm.normalized_shape == (11,)
    assert net.rms[0].normalized_shape == net.rms[1].normalized_shape == (8,)
    assert net(torch.zeros(3, 5)).shape == (3, 2)


class Shared(nn.Module):
    """A module that is called several times, a residual, a concatenation."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(5, 8)
        self.block = nn.Sequential(nn.Linear(8, 6), nn.ELU(), nn.Linear(6, 8))
        self.side = nn.Linear(5, 4)
        self.head = nn.Linear(8 + 4, 3)

    def forward(self, x):
        h = self.lift(x)
        for _ in range(3):
            h = h + self.block(h)
        return self.head(torch.cat([h, torch.tanh(self.side(x))], -1))


def test_modules_called_several_times_residuals_and_concatenation():
    net = Shared()
    structure = find_groups(one(net))
    assert structure.widths == {"lift+block.2": 8, "block.0": 6, "side": 4}
    (head,) = [s for s in structure.groups[-1].slices if s.tensor == "head.weight"]
    assert head.index.tolist() == [8, 9, 10, 11]
    weight = net.head.weight.detach().clone()
    cut(one(net), {"side": [1], "lift+block.2": [0, 7]})
    assert torch.equal(net.head.weight, weight[:, [1, 2, 3, 4, 5, 6, 8, 10, 11]])


def test_several_entry_points():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 2), nn.Linear(7, 3)

    net = Two()
    ties = one(net, lambda m, x: [m.one(m.body(x)), m.two(m.body(x).relu())])
    (group,) = find_groups(ties).groups
    assert {s.tensor for s in group.slices} == {
        "body.weight",
        "body.bias",
        "one.weight",
        "two.weight",
    }
    with pytest.raises(UserError, match=re.escape("'model.two.weight' takes no part")):
        find_groups(one(net, lambda m, x: m.one(m.body(x))))


def test_tied_weights_are_cut_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(5, 7, bias=False)
            self.up = nn.Linear(7, 5, bias=False)
            self.up.weight = nn.Parameter(torch.randn(5, 7))
            self.again = nn.Linear(7, 5, bias=False)
            self.again.weight = self.up.weight

        def forward(self, x):
            return self.up(self.down(x)) + self.again(self.down(x))

    net = Tied()
    cut(one(net), {"down": [3]})
    assert net.again.weight is net.up.weight
    assert net.up.weight.shape == (5, 6)
    assert net.again.in_features == net.up.in_features == 6


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: x.cumsum(-1), "depends on the order"),
        (lambda x: x.sort(-1).values, "depends on the order"),
        (lambda x: x.flip(-1), "depends on the order"),
        (lambda x: x.argmax(-1).float(), "search for an extreme"),
        (lambda x: torch.linalg.qr(x)[0], "linalg_qr"),
        (lambda x: F.glu(x), "glu"),
        (lambda x: x.roll(1, -1), "depends on the order"),
        (lambda x: F.pad(x, (0, 1)), "padding"),
        (lambda x: F.conv1d(x[None], torch.zeros(8, 1, 3, device="meta"), groups=8), "in 8 groups"),
        (lambda x: torch.fft.fft(x).real, "fft"),
        (lambda x: x.view(torch.int32).float(), "a view as another type"),
    ],
)
def test_an_unknown_operation_on_a_prunable_channel_is_an_error_that_names_it(operation, name):
    net = nn.Sequential(nn.Linear(5, 8))
    shape = (8, 5) if "groups" in name else (3, 5)
    with pytest.raises(UnknownOperation, match=name) as error:
        find_groups(one(net, lambda m, x: operation(m(x) if shape[0] == 3 else m(x).T), shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x[:, :4] * 2,
        lambda x: x.chunk(2, -1)[0],
        lambda x: x[..., 3],
        lambda x: x + torch.ones(8, device="meta"),
        lambda x: x.split([3, 5], -1)[1],
    ],
)
def test_channels_picked_by_position_or_met_from_outside_stay(operation):
    net = nn.Sequential(nn.Linear(5, 8))
    assert widths_of(net, lambda m, x: operation(m(x)).sum()) == {}


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.mean(-1),
        lambda x: x.norm(dim=-1),
        lambda x: x.softmax(-1).sum(-1),
        lambda x: x.amax(-1),
        lambda x: F.normalize(x, dim=-1).square().sum(-1),
        lambda x: F.dropout(x, 0.1).var(-1),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)).logsumexp(-1),
        lambda x: F.mse_loss(x, torch.zeros_like(x)),
        lambda x: x.t().reshape(-1).sum(),
        lambda x: x.unsqueeze(1).expand(-1, 4, -1).flatten(0, 1).sum(-1),
        lambda x: F.rms_norm(x, x.shape[-1:]).sum(-1),
        lambda x: F.hardswish(F.softplus(x)).clamp(-1, 1).sum(-1),
        lambda x: F.log_softmax(x, -1).sum(-1),
        lambda x: torch.stack([x, x * 2]).sum((0, 2)),
        lambda x: x.max(),
    ],
)
def test_what_leaves_out_a_removed_channel_lets_it_be_pruned(operation):
    net = nn.Sequential(nn.Linear(5, 8))
    assert widths_of(net, lambda m, x: operation(m(x))) == {"0": 8}


def test_a_second_trace_is_as_the_first():
    """What is kept from one trace to the next knows nothing of chance or of the default dtype."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)) * torch.rand(1))

    def widths():
        network = tag(Noisy(), "all")
        x = torch.zeros(2, 3, device="meta")
        return find_groups(Computation({"model": network}, lambda n: n["model"](x))).widths

    assert widths() == widths() == {"first": 8}
    whole = torch.zeros(3, dtype=torch.int64, device="meta")
    try:
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            assert tracing._result(torch.ops.aten.div.Tensor, (whole, whole), {}).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_module_without_a_component_is_named():
    bare = nn.Sequential(nn.Linear(5, 3))
    ties = Computation({"model": bare}, lambda n: n["model"](torch.zeros(1, 5, device="meta")))
    with pytest.raises(UserError, match="module '0' has parameters but belongs to no component"):
        find_groups(ties)


def test_the_table_and_its_json_agree():
    _, ties = small_learner()
    structure = find_groups(ties)
    table = structure.table()
    described = json.load(io.StringIO(json.dumps(structure.as_json())))
    for group in described:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {group['name']} ")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == group["kind"]
        assert [int(cells[i]) for i in (3, 4, 6)] == [
            group["width"],
            group["parameters_per_unit"],
            group["planning_macs_per_unit"],
        ]
    assert "12 groups (1 coupling)" in table
    assert "reward.0*" in table and "reward.2*" not in table  # what the coupling group touches
