"""Exactness: a network that was cut equals the full one whose units are excluded.

Checked without the tracer's help: `pruning_zoo` knows which width every layer reads and writes.
"""

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.surgery import SurgeryError, commit
from tests.pruning_zoo import Agent, NormedLinear, Stacked, computation, exclude, losses, make_data


def group_names(world, structure):
    """Name of a width → name of its group, by the layer that writes it."""
    found = {}
    for path, module in world.named_modules():
        if isinstance(module, Stacked):
            found["ensemble"] = group_with(structure, f"{path}.first", 2)
        elif getattr(module, "writes", None):
            found[module.writes] = group_with(structure, f"{path}.weight", 0)
    return found


def group_with(structure, tensor, dim):
    (name,) = [
        group.name
        for group in structure.groups
        if any((s.network, s.tensor, s.dim) == ("model", tensor, dim) for s in group.slices)
    ]
    return name


def make_plan(structure, removed):
    """A plan that removes these units, by group."""
    zero = {name: (0, 0) for name in structure.components}
    homes = {group.name: group.components[0] for group in structure.groups}
    return Plan("test", "test", 0.0, 1, structure.widths, removed, homes, zero, zero)


def choose(seed, world, structure):
    """A random selection: kept units (bool) by width, and the plan that keeps them."""
    chance = random.Random(seed)
    names = group_names(world, structure)
    keep, removed = {}, {}
    for width in world.widths.values():
        count = chance.randint(0, width.units - 1)
        gone = sorted(chance.sample(range(width.units), count))
        keep[width.name] = torch.tensor([unit not in gone for unit in range(width.units)])
        if gone:
            removed[names[width.name]] = gone
    return keep, make_plan(structure, removed)


def sliced(world, keep):
    """Name of a parameter → index of what is left of it, from what each layer reads and writes."""
    channels = {name: world.widths[name].channel_mask(mask) for name, mask in keep.items()}

    def read(reads):
        return torch.cat(
            [channels[r] if isinstance(r, str) else torch.ones(r, dtype=torch.bool) for r in reads]
        )

    found = {}
    for path, module in world.named_modules():
        if isinstance(module, nn.Linear):
            rows = channels[module.writes] if module.writes else slice(None)
            found[f"{path}.weight"] = (rows, read(module.reads))
            found[f"{path}.bias"] = (rows,)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            found[f"{path}.weight"] = found[f"{path}.bias"] = (channels[module.on],)
        elif isinstance(module, Stacked):
            hidden = channels["ensemble"]
            found[f"{path}.first"] = (slice(None), read(module.reads), hidden)
            found[f"{path}.first_bias"] = (slice(None), slice(None), hidden)
            found[f"{path}.second"] = (slice(None), hidden)
            found[f"{path}.second_bias"] = ()
    return found


def take(tensor, index):
    for dim, part in enumerate(index):
        if isinstance(part, torch.Tensor):
            tensor = tensor.index_select(dim, part.nonzero().squeeze(1))
    return tensor


def close(one, other, atol=1e-10):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=atol)


@pytest.mark.parametrize(
    "part",  # of 500 examples, half a minute each, which several processes share
    [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))],
)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31 - 1))
@example(seed=41617)  # a gradient as small as Adam's eps
def test_a_cut_network_equals_the_one_with_units_excluded(part, seed):
    """Forward, a training step, targets and moments; random architectures and selections."""
    full = Agent(seed)
    for _ in range(2):
        full.step(make_data(full.world))
    cut = copy.deepcopy(full)
    ties = computation(cut.world, cut.target)
    structure = find_groups(ties)
    assert len(structure.groups) == len(full.world.widths)
    assert {g.name for g in structure.groups if g.coupling} == {
        group_names(full.world, structure)["latent"]
    }
    keep, plan = choose(seed, full.world, structure)
    for name, group in group_names(full.world, structure).items():
        assert structure.widths[group] == full.world.widths[name].units
    commit(plan, structure, ties, cut.optimisers)

    index = sliced(full.world, keep)
    pairs = list(zip(full.optimisers, cut.optimisers, strict=True))
    names = {id(p): name for name, p in full.world.named_parameters()}

    def compare_states(atol=1e-10):
        for ours, theirs in ((full.world, cut.world), (full.target, cut.target)):
            left = dict(theirs.named_parameters())
            for name, parameter in ours.named_parameters():
                close(take(parameter.data, index[name]), left[name].data, atol)
        for one, other in pairs:
            for p, q in zip(
                one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True
            ):
                for moment in ("exp_avg", "exp_avg_sq"):
                    close(take(one.state[p][moment], index[names[id(p)]]), other.state[q][moment])
                assert one.state[p]["step"] == other.state[q]["step"]

    compare_states()
    exclude(full.world, keep)
    exclude(full.target, keep)
    kept = full.world.widths["latent"].channel_mask(keep["latent"])
    for step in range(2):
        # Adam divides by the gradient's size: where that is near its eps of 1e-8, rounding is 1e-8
        # of a step of 0.01 and more. A wrong cut is wrong by whole steps.
        atol = 1e-10 if step == 0 else 1e-7
        data = make_data(full.world)
        with torch.no_grad():
            expected = losses(full.world, full.target, data, kept)
            found = losses(cut.world, cut.target, data)
            close(torch.stack(found), torch.stack(expected), atol)
            joint = torch.randn(5, full.world.latent.channels + full.world.action).double()
            inside = torch.cat([kept, torch.ones(full.world.action, dtype=torch.bool)])
            close(cut.world.ensemble(joint[:, inside]), full.world.ensemble(joint), atol)
            close(cut.world.reward(joint[:, inside]), full.world.reward(joint), atol)
            close(
                cut.world.policy(joint[:, : -full.world.action][:, kept]),
                full.world.policy(joint[:, : -full.world.action]),
                atol,
            )
        if step == 0:
            full.step(data, kept)
            cut.step(data)
            compare_states(atol=1e-8)
    for module in cut.world.modules():  # attributes say what the weights say
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            assert module.normalized_shape == tuple(module.weight.shape)
        if isinstance(module, NormedLinear):
            assert module.norm.normalized_shape == (module.out_features,)


def state_of(agent):
    """Every tensor of networks and optimisers, and every size attribute."""
    tensors = [*agent.world.state_dict().values(), *agent.target.state_dict().values()]
    for optimiser in agent.optimisers:
        for state in optimiser.state.values():
            tensors += state.values()
    sizes = [repr(module) for module in (agent.world, agent.target)]
    return [tensor.clone() for tensor in tensors], sizes


@pytest.mark.parametrize("failure", ["select", "trace", "widths"])
def test_a_cut_that_fails_changes_nothing(monkeypatch, failure):
    agent = Agent(3)
    agent.step(make_data(agent.world))
    ties = computation(agent.world, agent.target)
    structure = find_groups(ties)
    _, plan = choose(5, agent.world, structure)
    before = state_of(agent)
    calls = 0

    def fail(*arguments):
        nonlocal calls
        calls += 1
        if failure == "select" and calls < 8:
            return select(*arguments)
        if failure == "widths":
            return structure
        raise RuntimeError("on purpose")

    import tdmpc_prune.pruning.surgery as surgery

    select = surgery._select
    monkeypatch.setattr(surgery, "_select" if failure == "select" else "groups_left", fail)
    with pytest.raises(SurgeryError):
        commit(plan, structure, ties, agent.optimisers)
    after = state_of(agent)
    assert before[1] == after[1]
    assert all(torch.equal(one, other) for one, other in zip(before[0], after[0], strict=True))
    agent.step(make_data(agent.world))  # and it goes on learning


def test_a_plan_for_another_structure_is_refused_with_the_first_difference():
    agent = Agent(3)
    ties = computation(agent.world, agent.target)
    structure = find_groups(ties)
    _, plan = choose(5, agent.world, structure)
    name = next(iter(structure.widths))
    plan.widths[name] += 1
    with pytest.raises(UserError, match=f"group '{name}' has {structure.widths[name]} units"):
        commit(plan, structure, ties, agent.optimisers)
    plan.widths[name] -= 1
    plan.removed[name] = [99]
    with pytest.raises(UserError, match="damaged"):
        commit(plan, structure, ties, agent.optimisers)


def test_a_cut_twice_is_the_cut_of_both():
    one, two = Agent(11), Agent(11)
    for agent, cuts in ((one, [[0, 2]]), (two, [[0], [1]])):
        ties = computation(agent.world, agent.target)
        widths = find_groups(ties).widths
        widest = max(widths, key=widths.get)
        for units in cuts:
            structure = find_groups(ties)
            commit(make_plan(structure, {widest: units}), structure, ties, agent.optimisers)
    for first, second in zip(one.world.parameters(), two.world.parameters(), strict=True):
        assert np.array_equal(first.detach(), second.detach())


# --- An ordinary training loop ----------------------------------------------------------------


def small(width=16, inputs=5, bias=True):
    """A network of two layers, its computation and its structure."""
    net = nn.Sequential(nn.Linear(inputs, width, bias), nn.ReLU(), nn.Linear(width, 2, bias))
    for part in net:
        part.component = "net"
    ties = Computation({"model": net}, lambda n: n["model"](torch.zeros(3, inputs, device="meta")))
    return net, ties, find_groups(ties)


@pytest.mark.parametrize("alive", ["loss", "outputs", "graph", "nothing"])
@pytest.mark.parametrize("frozen", [False, True])
def test_training_goes_on_while_what_was_computed_before_the_cut_is_alive(alive, frozen):
    net, ties, structure = small()
    net[0].bias.requires_grad_(not frozen)
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad])
    seen, kept = [], []
    net[0].weight.register_hook(lambda gradient: seen.append(gradient.shape))
    net[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    for step in range(4):
        outputs = net(torch.randn(3, 5))
        loss = outputs.square().mean()
        optimiser.zero_grad()
        loss.backward(retain_graph=alive == "graph")
        optimiser.step()
        kept += [outputs] if alive == "outputs" else []
        if alive == "nothing":
            del loss, outputs
        if step in (1, 2):
            structure = commit(make_plan(structure, {"0": [0, 3]}), structure, ties, [optimiser])
    assert net[0].weight.grad.shape == net[0].weight.shape == (12, 5)
    assert seen[-2:] == [(2, 12), (12, 5)] and len(seen) == 8  # hooks stay


def test_a_loss_from_before_the_cut_says_that_it_is_too_old():
    net, ties, structure = small()
    loss = net(torch.randn(3, 5)).sum()
    commit(make_plan(structure, {"0": [0]}), structure, ties)
    with pytest.raises(RuntimeError, match="before the network was cut: compute it again"):
        loss.backward()
    net.zero_grad()
    net(torch.randn(3, 5)).sum().backward()


def test_a_loss_from_before_a_cut_that_was_undone_is_still_good(monkeypatch):
    import tdmpc_prune.pruning.surgery as surgery

    net, ties, structure = small()
    x = torch.randn(3, 5)
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    loss = net(x).sum()
    monkeypatch.setattr(surgery, "groups_left", lambda *_: 1 / 0)
    with pytest.raises(SurgeryError, match=r"'0' cannot be cut, and nothing was: .*division"):
        commit(make_plan(structure, {"0": [0]}), structure, ties)
    loss.backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


# --- Optimisers whose state has another shape --------------------------------------------------


class Foreign(torch.optim.Optimizer):
    """Plain gradient descent that keeps what `state` says for each parameter."""

    def __init__(self, parameters, state, **defaults):
        super().__init__(parameters, {"lr": 0.01} | defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = state(parameter)

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad


def factored(parameter):
    """As in transformers' Adafactor: the reduced dimension is gone."""
    if parameter.dim() < 2:
        return {"step": 3, "exp_avg_sq": torch.rand_like(parameter)}
    return {
        "step": torch.tensor(3.0),
        "exp_avg_sq_row": torch.rand(parameter.shape[:-1]),
        "exp_avg_sq_col": torch.rand(parameter.shape[:-2] + parameter.shape[-1:]),
        "RMS": 0.5,
        "unused": None,
        "later": torch.zeros(0),
    }


def train(net, optimiser):
    optimiser.zero_grad()
    net(torch.randn(4, net[0].in_features)).square().mean().backward()
    optimiser.step()


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adafactor,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adamax,
        torch.optim.ASGD,
        torch.optim.NAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), capturable=False, foreach=False),
        lambda p: Foreign(p, factored),
    ],
)
@pytest.mark.parametrize("width", [16, 5, 2])  # 5 and 2: square matrices
def test_optimisers_go_on_with_what_is_left_of_their_state(make, width):
    net, ties, structure = small(width)
    optimiser = make(list(net.parameters()))
    for _ in range(2):
        train(net, optimiser)
    before = {p: dict(optimiser.state[p]) for p in net.parameters()}
    commit(make_plan(structure, {"0": [1]}), structure, ties, [optimiser])
    rows = [unit for unit in range(width) if unit != 1]
    for parameter, dim in ((net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)):
        for key, value in optimiser.state[parameter].items():
            old = before[parameter][key]
            if not isinstance(value, torch.Tensor) or old.numel() <= 1:
                assert value is old
                continue
            if key.endswith("_row"):
                expected = old[rows] if dim == 0 else old
            elif key.endswith("_col"):
                expected = old[rows] if dim == 1 else old
            else:
                expected = old if old.shape[dim] == 1 else old.index_select(dim, torch.tensor(rows))
            assert torch.equal(value, expected)
    for _ in range(2):
        train(net, optimiser)


@pytest.mark.parametrize(
    ("state", "defaults", "what"),
    [
        (lambda p: {"precondition": torch.eye(len(p))}, {}, "'precondition' \\[16, 16\\]"),
        (lambda p: {"all": torch.zeros(p.numel())}, {}, "'all' \\[80\\]"),
        (lambda p: {"GG": [torch.eye(n) for n in p.shape]}, {}, "'GG'"),
        (lambda p: {"nested": {"exp_avg": torch.zeros_like(p)}}, {}, "'nested'"),
        (lambda p: {"block": torch.zeros(7)}, {}, "'block' \\[7\\]"),
        (lambda p: {}, {"history": torch.zeros(16)}, "'history' of a parameter group"),
    ],
)
def test_state_that_nobody_knows_how_to_cut_is_refused_and_nothing_changes(state, defaults, what):
    net, ties, structure = small()
    optimiser = Foreign(net.parameters(), state, **defaults)
    before = copy.deepcopy([net.state_dict(), optimiser.state_dict()])
    with pytest.raises(SurgeryError, match=f"'0' cannot be cut.*{what}.*new optimiser") as error:
        commit(make_plan(structure, {"0": [1]}), structure, ties, [optimiser])
    assert "Foreign" in str(error.value) and "\n" not in str(error.value)
    assert str(before) == str([net.state_dict(), optimiser.state_dict()])
    optimiser.state.clear()
    for group in optimiser.param_groups:
        group.pop("history", None)
    optimiser.defaults.pop("history", None)
    commit(make_plan(structure, {"0": [1]}), structure, ties, [optimiser])


def test_square_matrices_alone_do_not_tell_rows_from_columns():
    """Where nothing tells them apart, nothing is guessed."""
    net, ties, _ = small(2, inputs=2, bias=False)
    structure = find_groups(ties)
    optimiser = Foreign(net.parameters(), factored)
    with pytest.raises(
        SurgeryError, match=r"'exp_avg_sq_row' .2. that Foreign keeps of '0.weight'"
    ):
        commit(make_plan(structure, {"0": [1]}), structure, ties, [optimiser])
    assert net[0].weight.shape == (2, 2)


def test_the_optimiser_inside_of_an_optimiser_is_cut_too():
    net, ties, structure = small()
    outer = Foreign(net.parameters(), lambda p: {"e_w": torch.zeros_like(p)})
    outer.base_optimizer = torch.optim.Adam(outer.param_groups)
    train(net, outer.base_optimizer)
    commit(make_plan(structure, {"0": [1]}), structure, ties, [outer])
    assert outer.base_optimizer.state[net[0].weight]["exp_avg"].shape == (15, 5)
    train(net, outer.base_optimizer)


def test_lbfgs_is_refused_once_it_has_a_history():
    net, ties, structure = small()
    optimiser = torch.optim.LBFGS(net.parameters())

    def closure():
        optimiser.zero_grad()
        loss = net(torch.ones(4, 5)).square().mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    with pytest.raises(SurgeryError, match="LBFGS"):
        commit(make_plan(structure, {"0": [1]}), structure, ties, [optimiser])
    assert net[0].weight.shape == (16, 5)
    optimiser.step(closure)


@settings(max_examples=60, deadline=None)
@given(inputs=st.integers(1, 4), width=st.integers(2, 4), bias=st.booleans(), data=st.data())
def test_factored_state_is_cut_right_or_not_at_all(inputs, width, bias, data):
    """Row and column sums of a matrix, cut, are those of the matrix with the same rows marked."""
    net, ties, structure = small(width, inputs, bias)
    gone = data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1))

    def indices(parameter):  # every value says where it is
        rows = torch.arange(float(len(parameter)))
        if parameter.dim() < 2:
            return {"whole": rows.clone()}
        columns = torch.arange(100.0, 100 + parameter.shape[1])
        return {"row": rows, "column": columns, "whole": rows[:, None] + columns}

    optimiser = Foreign(net.parameters(), indices)
    try:
        commit(make_plan(structure, {"0": sorted(gone)}), structure, ties, [optimiser])
    except SurgeryError as error:
        assert "not certain" in str(error)
        assert net[0].out_features == width
        return
    left = [float(unit) for unit in range(width) if unit not in gone]
    if width > 1 and len(optimiser.state[net[0].weight]["row"]) > 1:
        assert optimiser.state[net[0].weight]["row"].tolist() == left
    assert optimiser.state[net[2].weight]["column"].tolist() == [100 + unit for unit in left]
    assert optimiser.state[net[2].weight]["whole"][1].tolist() == [101 + unit for unit in left]


# --- Every failure names the group -------------------------------------------------------------


@pytest.mark.parametrize(
    "fail",
    [
        lambda h: h.unflatten(-1, (4, 4)).flatten(-2),
        lambda h: h if h.shape[-1] == 16 else exec("assert False"),
        lambda h: h if h.shape[-1] == 16 else h + None,
        lambda h: h * (1 if h.shape[-1] == 16 else [][3]),
        lambda h: h * {16: 1.0}[h.shape[-1]],
        lambda h: h * (1.0 if h.shape[-1] >= 15 else 2.0),
    ],
)
def test_a_group_that_cannot_be_cut_is_named_and_nothing_changes(fail):
    class Rigid(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.last(fail(torch.relu(self.second(torch.relu(self.first(x))))))

    net = Rigid()
    for part in net.children():
        part.component = "net"
    ties = Computation({"model": net}, lambda n: n["model"](torch.zeros(3, 5, device="meta")))
    structure = find_groups(ties)
    before = copy.deepcopy(net.state_dict())
    plan = make_plan(structure, {"first": [1], "second": [0, 2]})
    with pytest.raises(SurgeryError, match=r"^'second' cannot be cut, and nothing was: ") as error:
        commit(plan, structure, ties)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.second.out_features == net.last.in_features == 16
    commit(make_plan(structure, {"first": [1]}), structure, ties)
