"""Importance: formulas against plain loops, the posterior against sampling, known answers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tdmpc_prune.prunable import Computation, tag
from tdmpc_prune.pruning.allocation import make_plan
from tdmpc_prune.pruning.config import GRADIENT_METRICS, L2, METRICS, PruneConfig
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.importance import Tracker, credible_bound, fit_prior, posterior, weight_sum
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.surgery import commit, kept_units
from tdmpc_prune.training import launch
from tests.small import AGENT, small_config


def make_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        tag(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ELU()), "body"),
        tag(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), "middle"),
        tag(nn.Linear(5, 2), "head"),
    )
    return net, Computation({"net": net}, lambda n: n["net"](torch.zeros(1, 4, device="meta")))


def train_step(net, tracker, seed, scale=(1.0, 1.0), learn=False):
    """Two losses that train different parameters, as the agent's do."""
    torch.manual_seed(seed)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    named = list(net.named_parameters())
    parts = {"one": named[:6], "two": named[6:]}
    gradients = {}
    for (loss, parameters), factor in zip(parts.items(), scale, strict=True):
        value = factor * (net(x) - y).square().mean()
        for _, p in parameters:
            p.grad = None
        value.backward(inputs=[p for _, p in parameters])
        tracker(loss, parameters)
        gradients |= {name: p.grad.double() for name, p in parameters}
    if learn:
        with torch.no_grad():
            for _, p in named:
                p -= 0.1 * p.grad
    return gradients, parts


def plain_densities(structure, net, gradients, parts, statistic):
    """Unit by unit, element by element."""
    values = {n: statistic(p.detach().double(), gradients[n]) for n, p in net.named_parameters()}
    for parameters in parts.values():
        mean = sum(values[n].sum() for n, _ in parameters) / sum(p.numel() for _, p in parameters)
        for name, _ in parameters:
            values[name] = values[name] / mean
    found = []
    for group in structure.groups:
        for unit in range(group.width):
            own = []
            for s in group.slices:
                if s.network == "net":
                    place = [int(i) for i, u in zip(s.index, s.unit, strict=True) if u == unit]
                    own.append(values[s.tensor].index_select(s.dim, torch.tensor(place)).flatten())
            found.append(float(torch.cat(own).mean()))
    return np.array(found)


STATISTICS = {
    "gradient": lambda p, g: g.abs(),
    "fisher": lambda p, g: g.square(),
    "taylor": lambda p, g: (p * g).abs(),
    "fisher_increase": lambda p, g: (p * g).square(),
}


@pytest.mark.parametrize("metric", STATISTICS)
@pytest.mark.parametrize("compare", [True, False])
def test_densities_equal_plain_loops(metric, compare):
    net, ties = make_net()
    structure = find_groups(ties)
    config = PruneConfig(method=metric, compare=compare, smoothing=0.5, memory=0.9)
    tracker = Tracker(structure, net, config, seed=0)
    expected = [0.0, 0.0]
    for seed in range(4):
        gradients, parts = train_step(net, tracker, seed, learn=True)
        with torch.no_grad():  # the weights at the time of the gradient
            before = copy.deepcopy(net)
            for name, p in before.named_parameters():
                p += 0.1 * gradients[name].float()
        density = plain_densities(structure, before, gradients, parts, STATISTICS[metric])
        expected = [
            decay * past + density for decay, past in zip((0.5, 0.9), expected, strict=True)
        ]
    current, historical = expected[0] / weight_sum(0.5, 4), expected[1] / weight_sum(0.9, 4)
    for progress, exact in (
        (0.0, current),
        (1.0, historical),
        (0.5, np.sqrt(current * historical)),
    ):
        np.testing.assert_allclose(tracker.densities(metric, net, progress), exact, rtol=1e-4)


@pytest.mark.parametrize("metric", GRADIENT_METRICS)
def test_the_scale_of_a_loss_does_not_matter(metric):
    found = []
    for scale in ((1.0, 1.0), (1000.0, 0.01)):
        net, ties = make_net()
        tracker = Tracker(find_groups(ties), net, PruneConfig(method=metric), seed=0)
        for seed in range(3):
            train_step(net, tracker, seed, scale)
        found.append(tracker.densities(metric, net, 0.5))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.parametrize("metric", [*METRICS, L2])
def test_units_that_do_nothing_come_last_and_survivors_keep_their_evidence(metric):
    net, ties = make_net()
    idle = [1, 4]
    with torch.no_grad():
        net[1][0].weight[:, idle] = 0  # nothing reads them …
        net[0][0].weight[idle] = 0  # … and nothing is in them
        net[0][0].bias[idle] = 0
    structure = find_groups(ties)
    config = PruneConfig(method=metric, min_width=1, round_to=1)
    tracker = Tracker(structure, net, config, seed=3)
    for seed in range(5):
        train_step(net, tracker, seed)
    before = tracker.densities(metric, net, 0.3)
    if metric in ("taylor", "fisher_increase", "bayesian"):
        assert set(np.argsort(before[:6])[:2]) == set(idle)

    dense = structure.parameters()
    plan = make_plan(structure, before, config, 0.3, dense)
    left = commit(plan, structure, ties)
    kept = kept_units(plan)
    tracker.keep(kept, left, net)
    offset = {name: units.start for name, units in tracker.groups.items()}
    assert sum(len(units) for units in kept.values()) == sum(left.widths.values())
    after = tracker.densities(metric, net, 0.3)
    # Weights are fewer after it, and bayesian's prior is another group's.
    if metric not in ("magnitude", L2, "bayesian"):
        flat = np.concatenate(
            [units + start for units, start in zip(kept.values(), (0, 6), strict=True)]
        )
        np.testing.assert_allclose(after, before[flat])
    assert list(offset) == list(left.widths)
    train_step(net, tracker, 9)  # and goes on


def test_state_comes_back():
    net, ties = make_net()
    structure = find_groups(ties)
    one, other = (Tracker(structure, net, PruneConfig(), seed) for seed in (0, 1))
    for seed in range(3):
        train_step(net, one, seed)
    other.load_state(one.state(), structure, net)
    for tracker in (one, other):
        train_step(net, tracker, 7)
    for metric in METRICS:
        assert np.array_equal(one.densities(metric, net), other.densities(metric, net))


def test_random_is_drawn_once_per_seed():
    net, ties = make_net()
    structure = find_groups(ties)
    a, b, c = (Tracker(structure, net, PruneConfig(), seed) for seed in (0, 0, 1))
    first = a.densities("random", net)
    train_step(net, a, 0)
    assert np.array_equal(a.densities("random", net), first)
    assert np.array_equal(b.densities("random", net), first)
    assert not np.array_equal(c.densities("random", net), first)


def test_magnitude_is_the_root_mean_square_of_a_unit_and_was_its_norm_per_parameter():
    net, ties = make_net()
    tracker = Tracker(find_groups(ties), net, PruneConfig(), 0)
    parts = [net[0][0].weight[2], net[0][0].bias[2:3], net[0][1].weight[2:3], net[0][1].bias[2:3]]
    unit = torch.cat([*parts, net[1][0].weight[:, 2]])
    norm = unit.norm().item()
    assert tracker.densities("magnitude", net)[2] == pytest.approx(norm / len(unit) ** 0.5)
    assert tracker.densities(L2, net)[2] == pytest.approx(norm / len(unit))


def test_units_of_many_equal_weights_are_as_large_as_those_of_few_but_for_their_l2_norm():
    net, ties = make_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.5)
    tracker = Tracker(find_groups(ties), net, PruneConfig(), 0)
    counts = tracker.parameters.numpy()
    assert len(set(counts)) == 2  # of the two groups
    np.testing.assert_allclose(tracker.densities("magnitude", net), 0.5)
    np.testing.assert_allclose(tracker.densities(L2, net), 0.5 / np.sqrt(counts))


def test_what_magnitude_was_is_tracked_only_if_it_ranks():
    assert PruneConfig(method=L2).tracked == (*METRICS, L2)
    assert PruneConfig(method=L2, compare=False).tracked == (L2,)
    assert L2 not in PruneConfig(method="magnitude").tracked


# --- The Bayesian score --------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    energies=st.lists(st.floats(0.01, 100), min_size=1, max_size=60),
    decay=st.floats(0.5, 0.999),
    alpha=st.floats(2.5, 50),
    beta=st.floats(0.1, 50),
)
def test_closed_form_is_the_recursion(energies, decay, alpha, beta):
    a, b, smoothed = alpha, beta, 0.0
    for energy in energies:
        a = decay * a + (1 - decay) * alpha + 1
        b = decay * b + (1 - decay) * beta + energy
        smoothed = decay * smoothed + energy
    average = np.array([smoothed / weight_sum(decay, len(energies))])
    found = posterior(average, decay, len(energies), (alpha, beta))
    assert found[0] == pytest.approx(a, rel=1e-9)
    assert found[1][0] == pytest.approx(b, rel=1e-9)


def test_posterior_agrees_with_sampling():
    """Weighted draws from the prior, with observation k back in time counted to the power γ^k."""
    rng = np.random.default_rng(0)
    alpha, beta, decay = 4.0, 6.0, 0.8
    energies = rng.exponential(1.5, 12)
    powers = decay ** np.arange(len(energies))[::-1]
    rates = rng.gamma(alpha, 1 / beta, 2_000_000)
    log_weights = powers.sum() * np.log(rates) - rates * (powers * energies).sum()
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    mean = (weights / rates).sum()
    std = np.sqrt((weights / rates**2).sum() - mean**2)

    average = np.array([(powers * energies).sum() / powers.sum()])
    a, b = posterior(average, decay, len(energies), (alpha, beta))
    assert weight_sum(decay, len(energies)) == pytest.approx(powers.sum())
    m = b[0] / (a - 1)
    assert m == pytest.approx(mean, rel=5e-3)
    assert m / np.sqrt(a - 2) == pytest.approx(std, rel=2e-2)


@pytest.mark.parametrize("alpha", [3.5, 6.0, 20.0])
def test_prior_of_a_population_is_found(alpha):
    rng = np.random.default_rng(1)
    decay, updates, units = 0.99, 600, 20_000
    rates = rng.gamma(alpha, 1 / 2.0, units)
    smoothed = np.zeros(units)
    for _ in range(updates):
        smoothed = decay * smoothed + rng.exponential(1 / rates)
    energies = smoothed / weight_sum(decay, updates)
    found, beta = fit_prior(energies, decay, updates)
    assert found == pytest.approx(alpha, rel=0.25)
    assert beta / (found - 1) == pytest.approx(energies.mean())


def test_the_bound_shrinks_to_the_group_and_widens_with_doubt():
    energies = np.array([0.0, 1.0, 2.0, 9.0])
    early = credible_bound(energies, 0.99, 3, 1.0)
    late = credible_bound(energies, 0.999, 5000, 1.0)
    assert (np.diff(early) > 0).all() and (np.diff(late) > 0).all()
    assert early[0] > late[0] > 0  # a quiet unit that was hardly seen is not yet expendable
    assert (credible_bound(energies, 0.99, 3, 2.0) > early).all()
    alike = credible_bound(np.full(4, 2.0), 0.99, 100, 1.0)
    assert np.isfinite(alike).all() and np.ptp(alike) == 0


def test_a_group_that_no_loss_reaches_is_the_least_important_and_stays_finite():
    net, ties = make_net()
    with torch.no_grad():
        net[2].weight.zero_()  # as heads that start at zero: nothing flows back
    structure = find_groups(ties)
    tracker = Tracker(structure, net, PruneConfig(), seed=0)
    for seed in range(3):
        train_step(net, tracker, seed)
    assert credible_bound(np.zeros(4), 0.99, 3, 1.0).tolist() == [0, 0, 0, 0]
    for metric in METRICS:
        found = tracker.densities(metric, net, 0.5)
        assert np.isfinite(found).all() and (found >= 0).all()


def test_a_width_that_is_cut_to_one_unit_is_tracked_no_longer():
    net, ties = make_net()
    structure = find_groups(ties)
    config = PruneConfig(min_width=1, round_to=1)
    tracker = Tracker(structure, net, config, seed=0)
    train_step(net, tracker, 0)
    for _ in structure.groups:
        before = find_groups(ties)
        name, width = next(iter(before.widths.items()))
        zero = {c: (0, 0) for c in before.components}
        homes = {group.name: group.home for group in before.groups}
        plan = Plan(
            "test", "test", 0, 1, before.widths, {name: list(range(1, width))}, homes, zero, zero
        )
        left = commit(plan, before, ties)
        tracker.keep(kept_units(plan), left, net)
        assert name not in left.widths
        train_step(net, tracker, 1)
        assert len(tracker.densities("bayesian", net)) == sum(left.widths.values())


@pytest.mark.parametrize(("updates", "seen"), [(0.5, 100), (1.0, 200), (3.0, 200)])
def test_a_run_shows_importance_one_update_per_decision(tmp_path, updates, seen):
    learning = replace(AGENT.learning, updates_per_decision=updates)
    settings = small_config(tmp_path / "run", model=replace(AGENT, learning=learning))
    run, shown = launch.start(settings, []), []
    run.trainee.learner.gradient_hooks.append(lambda loss, parameters: shown.append(loss))
    run.run()
    assert run.trainee.learner.updates == 200 * updates
    assert shown == ["model_loss", "policy_loss"] * seen
