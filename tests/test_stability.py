"""Stability: statistics with known answers, disturbances, and a certificate as typed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from tdmpc_prune.envs import TaskError, disturb, make_env

from tdmpc_prune.agent.deciding import Choice
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.analysis import stability, stability_report
from tdmpc_prune.analysis.config import StabilityConfig
from tdmpc_prune.analysis.stability import Episodes, Judged, Rate, Stability, Target
from tdmpc_prune.evaluation import Evaluation
from tdmpc_prune.saving.agents import load_agent, load_agents
from tdmpc_prune.training import launch
from tests.commands import run
from tests.small import small_config

REACH = "gym:tests.synthetic:Reach-v0"


@given(trials=st.integers(1, 300), share=st.floats(0, 1))
def test_intervals_are_exact(trials, share):
    """Clopper-Pearson: the ends are quantiles of beta distributions."""
    successes = round(share * trials)
    rate = Rate.of([True] * successes + [False] * (trials - successes))
    low = beta.ppf(0.025, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1.0
    assert rate.low == pytest.approx(low, abs=1e-9) and rate.high == pytest.approx(high, abs=1e-9)


def test_nothing_tried_says_nothing():
    assert Rate.of([]) == Rate(0, 0, 0.0, 1.0)


def test_violations_count_outside_the_target_set_alone():
    gap = np.array([5.0, 4.0, 4.0, 6.0, 2.0, 0.5, 0.9, 0.1, 3.0, 1.0])
    # From 5, 4, 4, 6 and 2 (outside): down, level, up, down, down; then 3 -> 1 down.
    assert stability.violations(gap, 1.0).tolist() == [False, True, True, False, False, False]
    assert stability.violations(np.array([0.5, 0.9]), 1.0).tolist() == []


def test_to_stay_is_to_be_there_to_the_end():
    target = Target(largest_value=10.0, level=1.0, hold=3, decisions=6)
    assert stability.stays(np.array([9, 5, 3, 2, 1.0, 0.5, 0.9]), False, target)
    assert not stability.stays(np.array([9, 5, 0.1, 0.1, 0.1, 1.1, 0.1]), False, target)  # left
    assert not stability.stays(np.array([9, 5, 4, 3, 3, 2, 0.5]), False, target)  # came too late
    assert not stability.stays(np.array([9, 5, 3, 2, 1.0, 0.5, 0.9]), True, target)  # fell
    assert not stability.stays(np.array([0.1, 0.1, 0.1]), False, target)  # too short to tell


def test_the_target_set_is_where_the_references_own_episodes_end():
    values = [np.array([0.0, 5.0, 9.0, 8.0, 8.5]), np.array([1.0, 6.0, 10.0, 9.5, 9.0])]
    target = stability.target_of(values, hold=0.5, quantile=1.0)
    assert target == Target(largest_value=10.0, level=2.0, hold=2, decisions=4)
    gaps = [target.largest_value - value for value in values]
    assert all(stability.stays(gap, False, target) for gap in gaps)
    assert stability.target_of(values, hold=0.5, quantile=1e-9).level == pytest.approx(1.0)


def linear(factor, seed, episodes=80, steps=60):
    """x' = factor x from x0 in ±[1, 2], under the value -x², whose gap is a Lyapunov function."""
    rng = np.random.default_rng(seed)
    starts = rng.uniform(1, 2, episodes) * rng.choice([-1, 1], episodes)
    values = [-((x * factor ** np.arange(steps + 1)) ** 2) for x in starts]
    returns = [float(value.sum()) for value in values]
    return Episodes(values, [False] * episodes, returns, "native")


@pytest.mark.parametrize(
    ("factor", "violated", "stays"),
    [
        (0.8, 0.0, True),
        (-0.9, 0.0, True),
        (1.0, 1.0, False),
        (-1.0, 1.0, False),
        (1.05, 1.0, False),
    ],
)
def test_a_linear_system_is_stable_marginal_or_unstable(pruned, factor, violated, stays):
    """The reference contracts by 0.8; 0.8 and -0.9 are stable, ±1 marginal, 1.05 unstable."""
    settings = StabilityConfig("any", max_return_drop=0.999)
    target = stability.target_of(linear(0.8, 1).values, settings.hold, settings.level)
    dense, system = linear(0.8, 2), linear(factor, 2)
    agent, rng = load_agent(pruned), np.random.default_rng(0)
    mean = float(np.mean(dense.returns))
    # The target set of so fast a reference is tiny; the slower stable system gets there later.
    target = replace(target, level=1e-3)
    found = stability.assess("x", agent, system, mean, target, settings, rng)
    assert found.violations == violated * found.outside and found.outside > 0
    assert found.sampled == Rate.of([bool(violated)] * 80)
    assert found.stayed == Rate.of([stays] * 80)
    whole = stability.assess("dense", agent, dense, mean, target, settings, rng)
    assert whole.safe
    if factor == 0.8:
        cut = replace(found, sparsity=0.99)
        assert cut.safe and stability.boundary([whole, cut]) is cut
    if not stays:
        assert not found.safe and stability.boundary([whole, found]) is whole


def test_a_reference_that_knows_too_little_is_doubted():
    """A pruned agent that learnt on returned more, where an early reference saw no value."""
    rates = [Rate.of([True] * 90 + [False] * 10), Rate.of([False] * 100)]
    dense, later = (
        Judged(name, "", sparsity, 1, "native", 0, 1, rates[0], rate, value, 0.0, safe)
        for name, sparsity, rate, value, safe in (
            ("dense", 0.0, rates[0], 800.0, True),
            ("step-4", 0.5, rates[1], 850.0, False),
        )
    )
    target = Target(10.0, 1.0, 5, 20)
    found = Stability("r", target, (dense, later), dense, {})
    assert "step-4: the return is not less" in stability_report.text(found, StabilityConfig("any"))
    worse = replace(later, mean_return=700.0)
    found = Stability("r", target, (dense, worse), dense, {})
    assert "reference=" not in stability_report.text(found, StabilityConfig("any"))


def test_a_reference_that_returns_less_is_named():
    rate = Rate.of([True] * 40)
    dense, later = (
        Judged(name, "", sparsity, 1, "native", 0, 1, rate, rate, value, 0.0, True)
        for name, sparsity, value in (("dense", 0.0, 219.0), ("step-4", 0.5, 800.0))
    )
    found = Stability("r", Target(10.0, 1.0, 5, 20), (dense, later), later, {})
    config = StabilityConfig("any", episodes=40)
    assert (
        "the dense reference returns 219.0, less than step-4 (up to 800.0)"
        in stability_report.text(found, config)
    )
    names = stability_report.certificate(found, config)["return_more_than_the_reference"]
    assert names == ["step-4"]
    alike = replace(found, judged=(dense, replace(later, mean_return=225.0)))
    assert "returns 219.0, less" not in stability_report.text(alike, config)


@settings(max_examples=50, deadline=None)
@given(low=st.floats(0.03, 0.995), trials=st.integers(1, 400))
def test_what_it_takes_to_show_a_probability(low, trials):
    fewest, needed = Rate.fewest(low), Rate.needed(low, trials)
    assert Rate.of([True] * fewest).low >= low - 1e-9
    assert (needed is None) == (trials < fewest)
    if needed:
        assert Rate.of_counts(needed, trials).low >= low > Rate.of_counts(needed - 1, trials).low


def judged(name, sparsity, safe):
    rate = Rate.of([safe] * 10)
    return Judged(name, "", sparsity, 1, "native", 0, 1, rate, rate, 1.0, 0.0, safe)


@given(st.lists(st.booleans(), max_size=8))
def test_the_boundary_is_the_sparsest_that_is_safe(safe):
    agents = [judged(str(i), i / 10, each) for i, each in enumerate(safe)]
    found = stability.boundary(agents)
    assert found is (agents[len(safe) - 1 - safe[::-1].index(True)] if True in safe else None)


def test_the_verdict_names_what_is_not_safe_below_the_boundary():
    agents = tuple(judged(n, s, safe) for n, s, safe in (("dense", 0.0, True), ("a", 0.2, False)))
    found = Stability("r", Target(1.0, 0.1, 2, 9), agents, agents[0], {})
    assert "none of the cuts is safe" in stability_report.verdict(found, StabilityConfig("any"))
    more = (*agents, judged("b", 0.5, True))
    found = Stability("r", Target(1.0, 0.1, 2, 9), more, more[2], {})
    words = stability_report.verdict(found, StabilityConfig("any"))
    assert "sparsity 0.500 ('b')" in words and words.endswith("safe below it: a")


def test_values_are_those_of_the_policy():
    model = WorldModel(Widths(3, 1, 8, (4,), (8, 8), (8, 8), (8, 8), ((8, 8), (8, 8))))
    with torch.no_grad():
        for member, bias in zip(model.q_ensemble, (2.0, 1.5), strict=True):
            member[-1].bias.fill_(bias)  # its weights are zero in a new network
    values = stability.state_values(model, np.zeros((5, 3), np.float32))
    assert values.dtype == np.float64 and values == pytest.approx([1.5] * 5)


@pytest.mark.parametrize("path", ["native", "torch"])
def test_who_is_named_has_decided(small_run, monkeypatch, path):
    agent, asked = load_agent(small_run[0]), []

    def played(agent, episodes, seed, watch, disturbances, decisions):
        asked.append(decisions)
        for episode in range(episodes):
            watch(episode, np.zeros(agent.model.widths.observation, np.float32), False)
        return Evaluation([1.0] * episodes, 1, 1.0)

    monkeypatch.setattr(stability, "choose", lambda *_: Choice(path))
    monkeypatch.setattr(stability, "evaluate", played)
    parts = [stability._play(agent, agent.model, 2, seed, None) for seed in (0, 1)]
    found = stability._together(parts)
    assert asked == [path] * 2 and found.decisions == path
    assert len(found.values) == len(found.returns) == len(found.terminated) == 4


# --- Disturbances ----------------------------------------------------------------------------


def steps(env, actions, seed=3):
    observation, info = env.reset(seed=seed)
    found = [(observation, info["observation"])]
    for action in actions:
        observation, *_, info = env.step(np.array([action], np.float32))
        found.append((observation, info["observation"]))
    return found


def test_a_delayed_action_comes_one_decision_late():
    env = disturb(make_env(REACH), action_delay=1)
    x = [float(seen[0]) for seen, _ in steps(env, [1.0, -1.0, 1.0])]
    assert np.diff(x) == pytest.approx([0.0, 0.25, -0.25])


def test_noise_follows_the_seed_and_the_true_observation_is_told():
    env = disturb(make_env(REACH), observation_noise=0.1, action_noise=0.2)
    actions = [0.3] * 15
    one, again, other = (steps(env, actions, seed) for seed in (3, 3, 4))
    assert [float(seen[0]) for seen, _ in one] == [float(seen[0]) for seen, _ in again]
    noise = [float(seen[0] - true[0]) for run in (one, other) for seen, true in run]
    assert 0.05 < np.std(noise) < 0.2
    moved = np.diff([float(true[0]) for _, true in one])
    assert moved.mean() == pytest.approx(0.075, abs=0.05) and moved.std() > 0.01
    quiet = steps(disturb(make_env(REACH)), actions)
    assert all(np.array_equal(seen, true) for seen, true in quiet)


def test_a_heavier_pole_moves_otherwise_and_only_there():
    plain, same, heavy = (
        disturb(make_env("cartpole-swingup"), mass=mass) for mass in ({}, {}, {"pole_1": 2.0})
    )
    ways = [np.stack([true for _, true in steps(env, [1.0] * 20)]) for env in (plain, same, heavy)]
    assert np.array_equal(ways[0], ways[1]) and np.array_equal(ways[0][0], ways[2][0])
    assert np.abs(ways[0] - ways[2]).max() > 0.01
    models = [env.unwrapped.model for env in (plain, heavy)]
    masses = [model.body("pole_1").mass[0] for model in models]
    assert masses[1] == pytest.approx(2 * masses[0])
    with pytest.raises(TaskError, match=r"there is no body 'wheel'; there are .*pole_1"):
        disturb(make_env("cartpole-swingup"), mass={"wheel": 2.0})
    with pytest.raises(TaskError, match="only be changed of a task that runs on MuJoCo"):
        disturb(make_env(REACH), mass={"pole_1": 2.0})


# --- As typed --------------------------------------------------------------------------------


@pytest.fixture
def pruned(pruned_run):
    return pruned_run[0]


def test_a_whole_pruning_run_is_certified(pruned, tmp_path):
    arguments = [f"checkpoint={pruned}", "episodes=12", "max_return_drop=0.99", "out=c"]
    done = run("stability.py", *arguments, "probability=0.01", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = ["c-boundary.png", "c-gap.csv", "c-gap.png", "c.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    found = json.loads((tmp_path / "c.json").read_text())
    assert len(found["assumptions"]) >= 5 and "no proof" in " ".join(found["assumptions"])
    assert found["seeds"]["calibration"] != found["seeds"]["each agent"]
    agents = found["agents"]
    assert agents[0]["name"] == "dense" and agents[0]["sparsity"] == 0
    assert [agent["name"] for agent in agents[1:4]] == ["step-1", "step-2", "step-3"]
    assert all(agent["stayed"]["trials"] == 12 for agent in agents)
    assert {agent["decisions"] for agent in agents} <= {"native", "torch"}
    assert found["target"]["decisions"] == 20 and found["target"]["hold"] == 5
    again = run("stability.py", *arguments, "probability=0.01", "processes=1", cwd=tmp_path)
    lines = (tmp_path / "c-gap.csv").read_text().splitlines()
    assert len(lines) == 1 + 12 * len(agents)
    assert again.stdout == done.stdout  # the number of processes changes nothing


def test_networks_that_a_run_keeps_twice_are_judged_once(pruned):
    kept, judged = load_agents(pruned), stability._agents(StabilityConfig(str(pruned)))[0]
    assert list(kept) == ["dense", "step-1", "step-2", "step-3", "latest"]
    assert list(judged) == ["step-1", "step-2", "step-3"]
    one = judged["step-3"]
    faster = replace(one.config, planner=replace(one.config.planner, iterations=1))
    assert stability._alike(one, kept["latest"])
    assert not stability._alike(one, replace(one, config=faster))
    assert not stability._alike(one, judged["step-2"])


def test_one_agent_with_a_reference_of_its_own_and_disturbances(pruned, tmp_path):
    other = tmp_path / "other"
    launch.start(replace(small_config(other), seed=2), []).run()
    arguments = [f"checkpoint=[{pruned}/agents/step-3]", f"reference={other}", "episodes=3"]
    arguments.append("probability=0.2")  # three of three show no more
    done = run("stability.py", *arguments, "disturb.observation_noise=0.3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "disturbed by {'observation_noise': 0.3}" in done.stdout
    found = json.loads((tmp_path / "stability.json").read_text())
    assert found["reference"].startswith(str(other))
    assert found["settings"]["disturb"]["observation_noise"] == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "'nowhere' does not exist"),
        (["checkpoint=3"], "checkpoint=3 must be a folder, or a list"),
        (
            ["checkpoint=PRUNED", "episodes=20"],
            "if all 20 stay, the lower 95 % end is 0.832; give episodes=36 or more (36 of 36)",
        ),
        (["checkpoint=PRUNED", "episodes=99", "probability=0.99"], "give episodes=368 or more"),
        (["checkpoint=.", "level=2"], "level=2.0 must lie in (0, 1)"),
        (["checkpoint=.", "disturb.action_delay=-1"], "disturb.action_delay=-1 cannot be negative"),
        (["checkpoint=PRUNED", "disturb.mass={pole_1: 2.0}"], "only be changed of a task that"),
        (["checkpoint=PRUNED", "disturb.mass={pole_1: -1}"], "pole_1=-1.0 must be positive"),
        (["checkpoint=PRUNED", "reference=nowhere"], "'nowhere' does not exist"),
        (["checkpoint=PRUNED", "reference=PRUNED"], "is pruned; it must be a dense agent"),
        (["checkpoint=PRUNED", "out=nowhere/x"], "out=nowhere/x cannot be written"),
    ],
)
def test_wrong_input_is_one_line(pruned, tmp_path, arguments, message):
    arguments = [argument.replace("PRUNED", str(pruned)) for argument in arguments]
    done = run("stability.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.strip().splitlines() if "playing" not in line]
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not list(tmp_path.iterdir())
