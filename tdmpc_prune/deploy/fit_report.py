"""What the fit of an agent to a control rate found, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.controller import CPU_MS, median_and_p95
from tdmpc_prune.deploy.config import FitConfig
from tdmpc_prune.errors import RunError
from tdmpc_prune.evaluation import Evaluation
from tdmpc_prune.saving.files import png
from tdmpc_prune.words import counted, csv_text, mean_and_std
from tdmpc_prune.words import table as markdown


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
    p95_ms: float
    returns: tuple[float, ...] = ()
    first: int = 0  # how many of them every candidate played

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def first_mean(self) -> float:
        """Of the episodes that every candidate played."""
        return float(np.mean(self.returns[: self.first]))


@dataclass(frozen=True)
class Confirmation:
    """A candidate looked at again: timed for longer, and played on episodes of its own."""

    candidate: Candidate
    decision_ms: list[float]
    evaluation: Evaluation | None  # None if 95 % were not fast enough

    @property
    def median_ms(self) -> float:
        return median_and_p95(self.decision_ms)[0]

    @property
    def p95_ms(self) -> float:
        return median_and_p95(self.decision_ms)[1]


@dataclass(frozen=True)
class Reference:
    """The return of which a fraction may be lost: the best that is known."""

    mean_return: float
    name: str  # of the agent that it is of
    dense: float  # the dense agent's

    def __str__(self) -> str:
        if self.name == "dense":
            return f"the dense agent's {self.dense:.1f}"
        return (
            f"the {self.mean_return:.1f} on file for '{self.name}', because the dense agent, which "
            f"had learnt less, returns {self.dense:.1f}"
        )


@dataclass(frozen=True)
class Fit:
    """What the search found."""

    played: list[Candidate]  # all that were fast enough and not dominated; the best come first
    period_ms: float
    least_return: float
    reference: Reference
    confirmations: list[Confirmation]  # the last of them is the fitted agent's, if there is one
    fitted: Agent | None  # None if no candidate is both fast and good enough


def frontier(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other one beats in both time and return of the same episodes."""
    return [
        one
        for one in candidates
        if not any(
            (other.decision_ms <= one.decision_ms and other.first_mean > one.first_mean)
            or (other.decision_ms < one.decision_ms and other.first_mean >= one.first_mean)
            for other in candidates
        )
    ]


def table(found: Fit) -> str:
    """The candidates that were played, as Markdown."""
    best = frontier(found.played)
    rows = [
        (
            c.network,
            c.parameters,
            f"{c.sparsity:.3f}",
            f"{c.samples} × {c.iterations} × {c.horizon}",
            f"{c.decision_ms:.2f}",
            f"{c.p95_ms:.2f}",
            f"{1000 / c.decision_ms:.0f}",
            mean_and_std(c.returns),
            len(c.returns),
            "yes" if c in best else "",
        )
        for c in found.played
    ]
    names = ["networks", "parameters", "sparsity", "samples × iterations × horizon"]
    names += [f"{CPU_MS}, median", "95 %", "Hz", "return", "episodes", "frontier"]
    return markdown(rows, names)


def sentence(found: Fit, config: FitConfig) -> str:
    """What was found, in words."""
    planner, size = found.fitted.config.planner, found.fitted.size()
    last = found.confirmations[-1]
    median, mean = last.median_ms, last.evaluation.mean
    better = mean > found.reference.mean_return
    return (
        f"{size['parameters']:,} parameters, {planner.samples} samples, "
        f"{counted(planner.iterations, 'iteration')}, horizon {planner.horizon}: "
        f"{median:.2f} {CPU_MS} ({1000 / median:.0f} Hz; 95 % within {last.p95_ms:.2f} ms), "
        f"return {mean_and_std(last.evaluation.returns)} over "
        f"{counted(len(last.evaluation), 'other episode')}, at least "
        f"{found.least_return:.1f} was asked for, of {found.reference}"
        + ("; the fitted agent returns more than that" if better else "")
    )


def candidates_csv(found: Fit) -> str:
    """The same, with the returns of all episodes."""
    rows = [asdict(c) | {"returns": " ".join(f"{r:.3f}" for r in c.returns)} for c in found.played]
    return csv_text((row.values() for row in rows), rows[0])


def picture(found: Fit) -> bytes:
    """Return against milliseconds per decision, as PNG."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    smallest_first = sorted(found.played, key=lambda c: c.parameters)
    for network in dict.fromkeys(c.network for c in smallest_first):
        own = [c for c in found.played if c.network == network]
        label = f"{network}: {own[0].parameters:,} parameters"
        axis.plot([c.decision_ms for c in own], [c.first_mean for c in own], "o", label=label)
    best = sorted(frontier(found.played), key=lambda c: c.decision_ms)
    axis.step(
        [c.decision_ms for c in best],
        [c.first_mean for c in best],
        where="post",
        color="0.4",
        label="frontier",
    )
    axis.axvline(found.period_ms, color="C3", linestyle="--", label="the rate's period")
    axis.axhline(found.least_return, color="C3", linestyle=":", label="least return")
    if found.fitted:
        won = found.confirmations[-1].candidate
        at = (won.decision_ms, won.first_mean)
        ring = {"markersize": 14, "markerfacecolor": "none", "markeredgewidth": 2}
        axis.plot(*at, "o", color="black", label="chosen, and confirmed", **ring)
    axis.set_xlabel(f"{CPU_MS} (median)")
    axis.set_ylabel(f"return of the first {found.played[0].first} episodes")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    return png(figure)


def failure(found: Fit, config: FitConfig) -> RunError:
    """Why nothing was saved, and what was reached."""
    limits = f"rate_hz={config.rate_hz:g} with max_return_drop={config.max_return_drop:g}"
    start = f"{limits} cannot be reached here with {counted(config.threads, 'thread')}"
    if not found.played:
        return RunError(
            f"{start}: the smallest networks and planner budget are too slow; nothing was saved"
        )
    fast = [c for c in found.confirmations if c.evaluation is not None]
    if not fast:
        quickest = min(found.confirmations, key=lambda c: c.p95_ms)
        return RunError(
            f"{start}: the best candidates took {quickest.median_ms:.2f} ms per decision and more "
            f"(CPU time; 95 % within {quickest.p95_ms:.2f} ms) when timed for longer, 95 % must "
            f"stay within {found.period_ms:.2f} ms; nothing was saved"
        )
    best = max(fast, key=lambda c: c.evaluation.mean)
    return RunError(
        f"{start}: the best that is fast enough ({best.median_ms:.2f} ms per decision) returned "
        f"{best.evaluation.mean:.1f}, and {found.least_return:.1f} is needed; nothing was saved"
        + ("" if found.reference.name == "dense" else f" (it is measured by {found.reference})")
    )
