"""Fit an agent to a control rate: which networks, and how much planning, reach it at least loss.

Candidates are the networks of a pruning run (dense, and after every cut) with planner budgets
(samples, iterations, horizon). For each network, time decides which budgets are fast enough; of
those, only the largest ones are played, because more planning with the same networks is not worse.
All are played a few episodes; the best are played again, and then, one after another until one is
good enough, on episodes that did not choose them. What is fitted keeps the rate in 95 % of its
decisions, by CPU time. (Ours.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.config import PlannerConfig
from tdmpc_prune.agent.controller import decision_milliseconds, median_and_p95
from tdmpc_prune.agent.deciding import choose
from tdmpc_prune.deploy import card as agent_report
from tdmpc_prune.deploy import fit_report, playing
from tdmpc_prune.deploy.card import recorded_returns
from tdmpc_prune.deploy.config import FitConfig
from tdmpc_prune.deploy.fit_report import Candidate, Confirmation, Fit, Reference
from tdmpc_prune.errors import UserError
from tdmpc_prune.saving.agents import load_agent, load_agents, load_parent
from tdmpc_prune.thresholds import least
from tdmpc_prune.training.config import PruneCheckpointConfig
from tdmpc_prune.training.launch import default_run_dir, pruning_run
from tdmpc_prune.words import folder_name

_SAMPLES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the agent's own
_FEWEST_SAMPLES = 16
_ITERATIONS = (1, 2, 3, 4, 6)
_HORIZONS = (1, 2, 3, 5)
_CUTTING_ENV_STEPS = 20_000
_REPEATS = 20  # timed decisions of a candidate
_CONFIRMING_REPEATS = 200
_MARGIN = 0.9  # of the control period: what is nearly too slow at first glance is left out
_FIRST_LOOK = 4  # every candidate is played a 4th of the episodes …
_SECOND_LOOK = 5  # … and the best five all of them

_bar = partial(tqdm, leave=False, disable=None)  # of progress, where somebody watches


def best_known(found: dict[str, Agent], dense: float) -> Reference:
    """The best return among the dense agent's and those on file for the networks.

    A dense agent that was cut while it still learnt returns less than what became of it.
    """
    known = {n: recorded_returns(agent) for n, agent in found.items() if not agent.is_dense}
    means = {name: float(np.mean(values)) for name, values in known.items() if values}
    best = max(means, key=means.get, default="dense")
    if means.get(best, dense) <= dense:
        return Reference(dense, "dense", dense)
    return Reference(means[best], best, dense)


def search(config: FitConfig, found: dict[str, Agent], reference: Reference) -> Fit:
    """Find the best agent that is fast enough.

    Args:
        config: rate, drop, episodes.
        found: the networks, by name.
        reference: the return to compare with.
    """
    period = 1000 / config.rate_hz
    least_return = least(reference.mean_return, config.max_return_drop)
    largest = [
        candidate
        for name, agent in _bar(found.items(), desc="timing", unit="network")
        for candidate in _largest_budgets(name, agent, _MARGIN * period, config.decisions)
    ]
    largest = _timed_in_turn(largest, found, config.decisions)

    def play(candidate: Candidate, episodes: int, seed: int) -> Candidate:
        agent = _with_budget(found[candidate.network], candidate)
        returns = (
            *candidate.returns,
            *playing.measure(agent, episodes, seed, config.decisions).returns,
        )
        return replace(candidate, returns=returns, first=candidate.first or episodes)

    first = -(-config.episodes // _FIRST_LOOK)
    played = [
        play(candidate, first, config.seed)
        for candidate in _bar(largest, desc="playing", unit="candidate")
    ]
    played.sort(key=lambda c: -c.mean)
    rest = config.episodes - first
    if rest:
        better = _bar(played[:_SECOND_LOOK], desc="playing the best", unit="candidate")
        played[:_SECOND_LOOK] = [play(candidate, rest, config.seed + first) for candidate in better]
        played[:_SECOND_LOOK] = sorted(played[:_SECOND_LOOK], key=lambda c: -c.mean)

    confirmations = []
    again = played[:_SECOND_LOOK]
    each = _decision_times(again, found, _CONFIRMING_REPEATS, config.decisions)
    for place, (candidate, times) in enumerate(zip(again, each, strict=True), start=1):
        agent = _with_budget(found[candidate.network], candidate)
        evaluation = None
        # One of the first look's 20 timings would be its 95 %; here there are enough.
        if max(median_and_p95(times)) <= period:
            # Episodes that neither chose it nor judged another one.
            seed = config.seed + place * config.episodes
            evaluation = playing.measure(agent, config.episodes, seed, config.decisions)
        confirmations.append(Confirmation(candidate, times, evaluation))
        if evaluation is not None and evaluation.mean >= least_return:
            return Fit(played, period, least_return, reference, confirmations, agent)
    return Fit(played, period, least_return, reference, confirmations, None)


def free_folder(config: FitConfig) -> Path:
    """Where the fitted agent goes. Raises UserError: it exists, or there is no agent to fit."""
    task = folder_name(load_agent(config.checkpoint).task)
    folder = Path(config.out or Path("runs") / task / f"fitted-{config.rate_hz:g}hz")
    agent_report.check_free(folder)
    return folder


def cutting(config: FitConfig) -> PruneCheckpointConfig | None:
    """The pruning run that makes the networks to choose from; None if they are there already.

    Raises:
        UserError: that run was made before.
    """
    agent, steps = load_agent(config.checkpoint), config.env_steps
    if steps is None:
        made = not agent.is_dense or (Path(config.checkpoint) / "agents").exists()
        steps = 0 if made else _CUTTING_ENV_STEPS
    if not steps:
        return None
    cut = PruneCheckpointConfig(
        config.checkpoint,
        config.prune,
        steps,
        seed=config.seed,
        threads=config.threads,
        decisions=config.decisions,
    )
    run_dir = default_run_dir(pruning_run(cut, []))
    if (run_dir / "run.json").exists():
        raise UserError(
            f"'{run_dir}' holds networks that were cut already; use them with checkpoint={run_dir}"
        )
    return cut


def dense_agent(config: FitConfig) -> Agent:
    """The dense agent whose return is the measure.

    Raises:
        UserError: there is none.
    """
    agent = load_agent(config.checkpoint)
    dense = load_parent(agent, config.parent) or (agent if agent.is_dense else None)
    if dense is None:
        raise UserError(
            f"'{config.checkpoint}' names no dense agent that is there; give parent=<checkpoint>"
        )
    return dense


def fit(config: FitConfig, folder: Path, command: str) -> Fit:
    """Search, and save what was found with its card and its frontier.

    Args:
        config: all settings; the networks have been cut already.
        folder: for the fitted agent; nothing is made there if none is found.
        command: that started it.

    Raises:
        UserError: there is no agent, or no dense one to compare it with.
        RunError: it could not be saved.
    """
    found = load_agents(config.checkpoint)
    dense = dense_agent(config)
    decisions = choose(config.decisions, dense.model.widths, dense.device).path
    config = replace(config, decisions=decisions)
    card = dense.provenance.get("evaluation", {"returns": []})
    played = None
    if len(card["returns"]) < config.episodes:
        played = playing.measure(dense, config.episodes, config.seed, decisions)
    returns = played.returns if played else card["returns"]
    result = search(config, found, best_known(found, float(np.mean(returns))))
    if result.fitted:
        last = result.confirmations[-1]
        columns = agent_report.columns(result.fitted, last.evaluation, dense, played, decisions)
        files = {
            "frontier.md": fit_report.table(result).encode(),
            "frontier.csv": fit_report.candidates_csv(result).encode(),
            "frontier.png": fit_report.picture(result),
        }
        seed = config.seed + len(result.confirmations) * config.episodes
        agent_report.ship(folder, columns, seed, config.threads, command, files)
    return result


def budgets(planner: PlannerConfig) -> list[PlannerConfig]:
    """The planner budgets to choose from, none larger than the agent's own, largest first."""
    samples = {max(_FEWEST_SAMPLES, round(share * planner.samples)) for share in _SAMPLES}
    samples = {count for count in samples if count <= planner.samples} or {planner.samples}
    iterations = {count for count in _ITERATIONS if count < planner.iterations}
    horizons = {count for count in _HORIZONS if count < planner.horizon}
    grid = product(
        sorted(samples, reverse=True),
        sorted(iterations | {planner.iterations}, reverse=True),
        sorted(horizons | {planner.horizon}, reverse=True),
    )
    return [_budget(planner, *sizes) for sizes in grid]


def _budget(planner: PlannerConfig, samples: int, iterations: int, horizon: int) -> PlannerConfig:
    """The planner with so much to do. The elites keep their share of the samples, the policy its
    number of trajectories: with few samples it is the better part of the proposals."""
    policy = min(planner.policy_samples, samples)
    return replace(
        planner,
        samples=samples,
        iterations=iterations,
        horizon=horizon,
        elites=max(1, round(samples * planner.elites / planner.samples)),
        policy_fraction=np.ceil(1e4 * policy / samples).item() / 1e4,
        start_horizon=planner.start_horizon and min(planner.start_horizon, horizon),
    )


def _largest_budgets(
    name: str, agent: Agent, limit_ms: float, decisions: str = "auto"
) -> list[Candidate]:
    """The budgets that are fast enough and of which none is larger in every respect.

    Time grows with each of samples, iterations and horizon, so that one timing decides on all
    budgets above it or below it.
    """
    size = agent.size()
    fast: list[tuple[PlannerConfig, tuple[float, float]]] = []  # with median and 95 %
    slow: list[PlannerConfig] = []
    for planner in budgets(agent.config.planner):
        if any(_within(planner, other) for other, _ in fast):
            continue
        if any(_within(other, planner) for other in slow):
            continue
        (times,) = decision_milliseconds(
            agent.with_planner(planner), repeats=_REPEATS, decisions=decisions
        )
        found = median_and_p95(times)
        if found[0] <= limit_ms:
            fast.append((planner, found))
        else:
            slow.append(planner)
    return [
        Candidate(
            name,
            size["parameters"],
            size["sparsity"],
            planner.samples,
            planner.iterations,
            planner.horizon,
            *times,
        )
        for planner, times in fast
    ]


def _decision_times(
    candidates: list[Candidate], found: dict[str, Agent], repeats: int, decisions: str
) -> list[list[float]]:
    """Times of single decisions of all candidates in turn, ms."""
    agents = [_with_budget(found[candidate.network], candidate) for candidate in candidates]
    return decision_milliseconds(*agents, repeats=repeats, decisions=decisions)


def _timed_in_turn(
    candidates: list[Candidate], found: dict[str, Agent], decisions: str
) -> list[Candidate]:
    """The candidates with times that can be compared with each other."""
    times = map(median_and_p95, _decision_times(candidates, found, _REPEATS, decisions))
    return [
        replace(candidate, decision_ms=median, p95_ms=p95)
        for candidate, (median, p95) in zip(candidates, times, strict=True)
    ]


def _within(small: PlannerConfig, large: PlannerConfig) -> bool:
    """Whether a budget is at most another in every respect."""
    return (
        small.samples <= large.samples
        and small.iterations <= large.iterations
        and small.horizon <= large.horizon
    )


def _with_budget(agent: Agent, candidate: Candidate) -> Agent:
    planner = _budget(
        agent.config.planner, candidate.samples, candidate.iterations, candidate.horizon
    )
    return agent.with_planner(planner)
