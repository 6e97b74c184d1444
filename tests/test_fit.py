"""Fitting to a rate: budgets against brute force, the frontier, the choice, and refusals."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.config import PRESETS, PlannerConfig
from tdmpc_prune.deploy import fit, fit_report
from tdmpc_prune.deploy.config import FitConfig
from tdmpc_prune.evaluation import Evaluation
from tdmpc_prune.saving.agents import load_agent
from tests.commands import run


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_budgets_are_within_the_agents_own_and_valid(preset):
    own = PRESETS[preset].value.planner
    found = fit.budgets(own)
    assert replace(found[0], policy_fraction=own.policy_fraction) == own
    for planner in found:
        assert planner.samples <= own.samples and planner.horizon <= own.horizon
        assert 1 <= planner.elites <= planner.samples
        assert planner.policy_samples == min(own.policy_samples, planner.samples)


@settings(max_examples=50, deadline=None)
@given(limit=st.floats(0.5, 10_000), powers=st.tuples(*[st.floats(0.1, 1.5)] * 3))
def test_the_largest_fast_budgets_are_those_of_brute_force(limit, powers):
    def cost(planner):
        sizes = (planner.samples, planner.iterations, planner.horizon)
        return float(np.prod([size**power for size, power in zip(sizes, powers, strict=True)]))

    agent = Agent(None, PRESETS["default"].value, "x", 1)
    timed = []

    def times(agent, repeats, decisions="auto"):
        timed.append(agent.config.planner)
        return [[cost(agent.config.planner)] * repeats]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "decision_milliseconds", times)
        patch.setattr(Agent, "size", lambda _: {"parameters": 1, "sparsity": 0.0})
        found = fit._largest_budgets("a", agent, limit)
    fast = [planner for planner in fit.budgets(agent.config.planner) if cost(planner) <= limit]
    sizes = [(planner.samples, planner.iterations, planner.horizon) for planner in fast]
    largest = {
        one
        for one in sizes
        if not any(other != one and all(np.array(other) >= one) for other in sizes)
    }
    assert {(c.samples, c.iterations, c.horizon) for c in found} == largest
    assert len(timed) <= len(fit.budgets(agent.config.planner))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(pairs):
    candidates = [
        fit_report.Candidate("a", 1, 0.0, i, 1, 1, float(ms), float(ms), (float(mean), 5.0), 1)
        for i, (ms, mean) in enumerate(pairs)
    ]
    for c in candidates:
        better = [
            o
            for o in candidates
            if o.decision_ms <= c.decision_ms
            and o.first_mean >= c.first_mean
            and (o.decision_ms, o.first_mean) != (c.decision_ms, c.first_mean)
        ]
        assert (c in fit_report.frontier(candidates)) == (not better)


def search_with(returns, monkeypatch, confirmed_ms=4.0, **settings):
    """A search among made-up networks; `returns` maps a network's name to its return."""
    config = replace(PRESETS["default"].value, planner=PlannerConfig(samples=64))
    agents = {name: Agent(name, config, "x", 1, {}) for name in returns}
    monkeypatch.setattr(Agent, "size", lambda _: {"parameters": 1, "sparsity": 0.0})

    def times(*agents, repeats, decisions="auto"):
        first_look = repeats < fit._CONFIRMING_REPEATS
        return [
            [agent.config.planner.samples / 8] if first_look else list(np.atleast_1d(confirmed_ms))
            for agent in agents
        ]

    monkeypatch.setattr(fit, "decision_milliseconds", times)

    def measure(agent, episodes, seed, decisions):
        value = returns[agent.model]
        value = value(seed) if callable(value) else value
        return Evaluation([value] * episodes, episodes, 1.0)

    monkeypatch.setattr(fit.playing, "measure", measure)
    config = FitConfig("x", rate_hz=200.0, **settings)
    return fit.search(config, agents, fit_report.Reference(100.0, "dense", 100.0))


def test_the_best_return_wins_and_is_confirmed_on_other_episodes(monkeypatch):
    found = search_with({"a": 90.0, "b": 99.0, "c": 97.0}, monkeypatch)
    assert found.fitted.model == "b" and found.played[0].network == "b"
    lucky = search_with(
        {"a": 90.0, "b": lambda seed: 99.0 if seed < 20 else 10.0, "c": 97.0}, monkeypatch
    )
    assert lucky.fitted.model == "c" and len(lucky.confirmations) == 2
    none = search_with({"a": 90.0, "b": 94.0}, monkeypatch)
    assert none.fitted is None
    assert "returned 94.0, and 95.0 is needed" in str(fit_report.failure(none, FitConfig("x")))


def test_a_second_look_at_the_time_counts(monkeypatch):
    slow_later = search_with({"a": 99.0}, monkeypatch, confirmed_ms=7.0)
    assert slow_later.fitted is None
    assert "took 7.00 ms per decision and more" in str(
        fit_report.failure(slow_later, FitConfig("x"))
    )


def test_a_rate_is_kept_by_95_percent(monkeypatch):
    failing = search_with({"a": 99.0}, monkeypatch, confirmed_ms=[4.0] * 180 + [7.0] * 20)
    assert failing.fitted is None
    said = str(fit_report.failure(failing, FitConfig("x")))
    assert "took 4.00 ms" in said and "95 % within 7.00 ms" in said and "within 5.00 ms" in said
    kept = search_with({"a": 99.0}, monkeypatch, confirmed_ms=[4.0] * 195 + [7.0] * 5)
    assert kept.fitted is not None


def agent_with(returns, dense=False):
    return SimpleNamespace(provenance={"returns": returns}, is_dense=dense)


def test_a_dense_agent_that_had_learnt_less_is_not_the_measure():
    found = {
        "dense": agent_with([230.0], dense=True),
        "step-1": agent_with([800.0, 900.0]),
        "latest": agent_with(None),
    }
    best = fit.best_known(found, 219.0)
    assert (best.mean_return, best.name, best.dense) == (850.0, "step-1", 219.0)
    assert "850.0 on file for 'step-1'" in str(best) and "returns 219.0" in str(best)
    assert fit.best_known(found, 900.0) == fit_report.Reference(900.0, "dense", 900.0)
    assert fit.best_known({}, -5.0) == fit_report.Reference(-5.0, "dense", -5.0)


def test_candidates_are_confirmed_in_turn(monkeypatch):
    together = []

    def times(*agents, repeats, decisions="auto"):
        together.append((len(agents), repeats))
        return [[4.0]] * len(agents)

    config = replace(PRESETS["default"].value, planner=PlannerConfig(samples=64))
    agents = {name: Agent(name, config, "x", 1, {}) for name in "abc"}
    monkeypatch.setattr(Agent, "size", lambda _: {"parameters": 1, "sparsity": 0.0})
    monkeypatch.setattr(fit, "decision_milliseconds", times)
    monkeypatch.setattr(
        fit.playing, "measure", lambda _, n, seed, decisions: Evaluation([99.0] * n, n, 1.0)
    )
    fit.search(FitConfig("x", rate_hz=200.0), agents, fit_report.Reference(100.0, "dense", 100.0))
    assert together[-2:] == [(3, fit._REPEATS), (3, fit._CONFIRMING_REPEATS)]


def test_fit_as_typed(pruned_run, tmp_path):
    pruned_run, _ = pruned_run
    arguments = [f"checkpoint={pruned_run}", "episodes=2", "out=fitted"]
    done = run("fit.py", *arguments, "rate_hz=30", "max_return_drop=0.99", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| step-3 " in done.stdout and "| dense " in done.stdout
    agent = load_agent(tmp_path / "fitted")
    assert agent.parent.resolve() == (pruned_run / "agents" / "dense").resolve()
    assert agent.provenance["commands"][-1].startswith("python scripts/fit.py checkpoint=")
    names = {path.name for path in (tmp_path / "fitted").iterdir()}
    assert names == {
        *("agent.json", "agent.safetensors", "card.md"),
        *("frontier.md", "frontier.csv", "frontier.png"),
    }
    again = run("fit.py", *arguments, "rate_hz=30", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_an_unreachable_rate_says_what_was_reached_and_saves_nothing(pruned_run, tmp_path):
    shutil.copytree(pruned_run[0], tmp_path / "run")
    dense = tmp_path / "run/agents/dense/agent.json"
    description = json.loads(dense.read_text())
    # A return that no other agent reaches.
    description["provenance"]["evaluation"] = {"returns": [1e6, 1e6]}
    dense.write_text(json.dumps(description))
    for rate, message in (
        ("1e6", "too slow; nothing was saved"),
        ("30", "and 950000.0 is needed; nothing was saved"),
    ):
        done = run(
            *("fit.py", "checkpoint=run", "episodes=2", "out=fitted", f"rate_hz={rate}"),
            cwd=tmp_path,
        )
        assert done.returncode == 1
        assert message in done.stderr.strip().splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "'nowhere' does not exist"),
        (["checkpoint=.", "rate_hz=0"], "rate_hz=0.0 must be positive"),
        (["checkpoint=.", "max_return_drop=1.5"], "max_return_drop=1.5 must lie in [0, 1)"),
        (["checkpoint=.", "env_steps=-1"], "env_steps=-1 cannot be negative"),
        (["rate_hz=10"], "checkpoint=… is needed"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, arguments, message):
    done = run("fit.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
