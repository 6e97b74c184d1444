"""Fit an agent to a control rate: which networks, and how much planning, reach it at least loss.

Candidates are the networks of a pruning run (dense, and after every cut) with planner budgets
(samples, iterations, horizon). For each network, time decides which budgets are fast enough; of
those, only the largest ones are played, because more planning with the same networks is not worse.
All are played a few episodes; the best are played again, and the winner once more on episodes that
did not choose it. (Ours.)
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from tdmpc_prune import agent_report, playing
from tdmpc_prune.agent.config import PlannerConfig
from tdmpc_prune.checkpoint import SavedAgent, dense_parent, load_agent
from tdmpc_prune.config import FitConfig, PruneCheckpointConfig
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.evaluation import Evaluation, agent_size, decision_milliseconds

_SAMPLES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the agent's own
_FEWEST_SAMPLES = 16
_ITERATIONS = (1, 2, 3, 4, 6)
_HORIZONS = (1, 2, 3, 5)
_CUTTING_ENV_STEPS = 20_000
_REPEATS = 9  # timed decisions of a candidate
_CONFIRMING_REPEATS = 200
_MARGIN = 0.9  # of the control period: what is nearly too slow at first glance is left out
_FIRST_LOOK = 4  # every candidate is played a 4th of the episodes …
_SECOND_LOOK = 5  # … and the best five all of them


@dataclass(frozen=True)
class Candidate:
    """A network with a planner budget."""

    network: str
    parameters: int
    sparsity: float
    samples: int
    iterations: int
    horizon: int
    decision_ms: float  # median
    returns: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))


@dataclass(frozen=True)
class Fit:
    """What the search found."""

    played: list[Candidate]  # all that were fast enough and not dominated, best return first
    period_ms: float
    least_return: float
    fitted: SavedAgent | None  # None if no candidate keeps enough of the return
    evaluation: Evaluation | None  # of the fitted agent, on episodes that did not choose it
    decision_ms: list[float]  # of the fitted agent

    def table(self) -> str:
        """The candidates that were played, as Markdown."""
        rows = [
            (
                c.network,
                c.parameters,
                f"{c.sparsity:.3f}",
                f"{c.samples} × {c.iterations} × {c.horizon}",
                f"{c.decision_ms:.2f}",
                f"{1000 / c.decision_ms:.0f}",
                f"{c.mean:.1f} ± {np.std(c.returns):.1f}",
                len(c.returns),
                "yes" if c in frontier(self.played) else "",
            )
            for c in self.played
        ]
        names = ["networks", "parameters", "sparsity", "samples × iterations × horizon"]
        names += ["ms per decision", "Hz", "return", "episodes", "frontier"]
        return tabulate(rows, names, "pipe", disable_numparse=True)

    def sentence(self, config: FitConfig) -> str:
        """What was found, in words."""
        planner, size = (
            self.fitted.config.planner,
            agent_size(self.fitted.model, self.fitted.config),
        )
        median, slow = np.median(self.decision_ms), np.percentile(self.decision_ms, 95)
        return (
            f"{size['parameters']:,} parameters, {planner.samples} samples, {planner.iterations} "
            f"iterations, horizon {planner.horizon}: {median:.2f} ms per decision "
            f"({1000 / median:.0f} Hz; 95 % within {slow:.2f} ms), return "
            f"{self.evaluation.mean:.1f} ± {self.evaluation.std:.1f} over "
            f"{len(self.evaluation.returns)} other episodes, at least {self.least_return:.1f} "
            f"was asked for"
        )

    def csv(self) -> str:
        """The same, with the returns of all episodes."""
        text = io.StringIO()
        rows = [
            asdict(c) | {"returns": " ".join(f"{r:.3f}" for r in c.returns)} for c in self.played
        ]
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def picture(self) -> bytes:
        """Return against milliseconds per decision, as PNG."""
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axis = figure.subplots()
        for network in dict.fromkeys(c.network for c in sorted(self.played, key=_by_parameters)):
            own = [c for c in self.played if c.network == network]
            label = f"{network}: {own[0].parameters:,} parameters"
            axis.plot([c.decision_ms for c in own], [c.mean for c in own], "o", label=label)
        best = sorted(frontier(self.played), key=lambda c: c.decision_ms)
        axis.step(
            [c.decision_ms for c in best],
            [c.mean for c in best],
            where="post",
            color="0.4",
            label="frontier",
        )
        axis.axvline(self.period_ms, color="C3", linestyle="--", label="the rate's period")
        axis.axhline(self.least_return, color="C3", linestyle=":", label="least return")
        axis.set_xlabel("ms per decision")
        axis.set_ylabel("return")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        return image.getvalue()


def networks(checkpoint: str) -> dict[str, SavedAgent]:
    """The agents to choose from, by name: all of a pruning run, or one with its dense parent.

    Raises:
        UserError: there is no agent.
    """
    kept = sorted(Path(checkpoint).glob("agents/*/agent.json"))
    found = {path.parent.name: load_agent(path.parent) for path in kept}
    latest = load_agent(checkpoint)
    name = "latest" if found else Path(checkpoint).name
    if not found and latest.parent:
        found["dense"] = load_agent(latest.parent)
    return found | {name: latest}


def search(config: FitConfig, found: dict[str, SavedAgent], reference: float) -> Fit:
    """Find the best agent that is fast enough.

    Args:
        config: rate, drop, episodes.
        found: the networks, by name.
        reference: the dense agent's return.
    """
    period = 1000 / config.rate_hz
    least = reference - config.max_return_drop * abs(reference)
    largest = [
        candidate
        for name, agent in tqdm(found.items(), desc="timing", unit="network", leave=False)
        for candidate in _largest_budgets(name, agent, _MARGIN * period)
    ]

    def play(candidate: Candidate, episodes: int, seed: int) -> Candidate:
        agent = _with_budget(found[candidate.network], candidate)
        returns = playing.measure(agent, episodes, seed).returns
        return replace(candidate, returns=(*candidate.returns, *returns))

    first = -(-config.episodes // _FIRST_LOOK)
    played = [
        play(candidate, first, config.seed)
        for candidate in tqdm(largest, desc="playing", unit="candidate", leave=False)
    ]
    played.sort(key=lambda c: -c.mean)
    rest = config.episodes - first
    if rest:
        best = tqdm(played[:_SECOND_LOOK], desc="playing the best", unit="candidate", leave=False)
        played[:_SECOND_LOOK] = [play(candidate, rest, config.seed + first) for candidate in best]
        played[:_SECOND_LOOK] = sorted(played[:_SECOND_LOOK], key=lambda c: -c.mean)

    for candidate in played[:_SECOND_LOOK]:
        agent = _with_budget(found[candidate.network], candidate)
        (times,) = decision_milliseconds((agent.model, agent.config), repeats=_CONFIRMING_REPEATS)
        if candidate.mean < least or np.median(times) > period:
            continue
        evaluation = playing.measure(agent, config.episodes, config.seed + config.episodes)
        if evaluation.mean >= least:
            return Fit(played, period, least, agent, evaluation, times)
    return Fit(played, period, least, None, None, [])


def free_folder(config: FitConfig) -> Path:
    """Where the fitted agent goes. Raises UserError: it exists, or there is no agent to fit."""
    task = load_agent(config.checkpoint).task.replace(":", "-").replace("/", "-")
    folder = Path(config.out or Path("runs") / task / f"fitted-{config.rate_hz:g}hz")
    agent_report.check_free(folder)
    return folder


def cutting(config: FitConfig) -> PruneCheckpointConfig | None:
    """The pruning run that makes the networks to choose from; None if they are there already."""
    steps = config.env_steps
    if steps is None:
        agent = load_agent(config.checkpoint)
        pruned = agent_size(agent.model, agent.config)["sparsity"] > 0
        steps = 0 if pruned or (Path(config.checkpoint) / "agents").exists() else _CUTTING_ENV_STEPS
    if not steps:
        return None
    return PruneCheckpointConfig(
        config.checkpoint, config.prune, steps, seed=config.seed, threads=config.threads
    )


def fit(config: FitConfig, folder: Path, command: str) -> Fit:
    """Search, and save what was found with its card and its frontier.

    Args:
        config: all settings; the networks have been cut already.
        folder: for the fitted agent; nothing is made there if none is found.
        command: that started it.

    Raises:
        UserError: there is no agent, or no return on file to compare it with.
        RunError: it could not be saved.
    """
    found = networks(config.checkpoint)
    latest = list(found.values())[-1]
    dense = dense_parent(config.checkpoint)
    returns = agent_report.recorded_returns(dense or latest)
    if not returns:
        raise UserError(f"'{config.checkpoint}' has no return on file to compare with")
    result = search(config, found, float(np.mean(returns)))
    if result.fitted:
        columns = agent_report.columns(result.fitted, result.evaluation, dense, None)
        files = {
            "frontier.md": result.table().encode(),
            "frontier.csv": result.csv().encode(),
            "frontier.png": result.picture(),
        }
        seed = config.seed + config.episodes
        agent_report.ship(folder, columns, seed, config.threads, command, files)
    return result


def failure(result: Fit, config: FitConfig) -> RunError:
    """Why nothing was saved, and what was reached."""
    limits = f"rate_hz={config.rate_hz:g} with max_return_drop={config.max_return_drop:g}"
    if not result.played:
        return RunError(
            f"{limits} cannot be reached here with {config.threads} thread(s): the smallest "
            f"networks and planner budget are too slow; nothing was saved"
        )
    best = result.played[0]
    return RunError(
        f"{limits} cannot be reached here with {config.threads} thread(s): the best that is fast "
        f"enough ({best.decision_ms:.2f} ms per decision) returned {best.mean:.1f}, and "
        f"{result.least_return:.1f} is needed; nothing was saved"
    )


def frontier(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other one beats in both time and return."""
    return [
        one
        for one in candidates
        if not any(
            (other.decision_ms <= one.decision_ms and other.mean > one.mean)
            or (other.decision_ms < one.decision_ms and other.mean >= one.mean)
            for other in candidates
        )
    ]


def _by_parameters(candidate: Candidate) -> int:
    return candidate.parameters


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
        start_horizon=min(planner.start_horizon, horizon),
    )


def _largest_budgets(name: str, agent: SavedAgent, limit_ms: float) -> list[Candidate]:
    """The budgets that are fast enough and of which none is larger in every respect.

    Time grows with each of samples, iterations and horizon, so that one timing decides on all
    budgets above it or below it.
    """
    size = agent_size(agent.model, agent.config)
    fast: list[tuple[PlannerConfig, float]] = []
    slow: list[PlannerConfig] = []
    for planner in budgets(agent.config.planner):
        if any(_within(planner, other) for other, _ in fast):
            continue
        if any(_within(other, planner) for other in slow):
            continue
        config = replace(agent.config, planner=planner)
        (times,) = decision_milliseconds((agent.model, config), repeats=_REPEATS)
        median = float(np.median(times))
        if median <= limit_ms:
            fast.append((planner, median))
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
            median,
        )
        for planner, median in fast
    ]


def _within(small: PlannerConfig, large: PlannerConfig) -> bool:
    """Whether a budget is at most another in every respect."""
    return (
        small.samples <= large.samples
        and small.iterations <= large.iterations
        and small.horizon <= large.horizon
    )


def _with_budget(agent: SavedAgent, candidate: Candidate) -> SavedAgent:
    planner = _budget(
        agent.config.planner, candidate.samples, candidate.iterations, candidate.horizon
    )
    return replace(agent, config=replace(agent.config, planner=planner))
