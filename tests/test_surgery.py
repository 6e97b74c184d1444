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


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31 - 1))
@example(seed=41617)  # a gradient as small as Adam's eps
def test_a_cut_network_equals_the_one_with_units_excluded(seed):
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
    monkeypatch.setattr(surgery, "_select" if failure == "select" else "find_groups", fail)
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
