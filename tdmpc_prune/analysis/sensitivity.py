"""What each group is worth, measured: units are removed, and the score is taken without recovery.

Of every group increasing fractions are removed, least important first and in a random order; the
random order is also cut into pieces that are removed one at a time, so that every unit is missing
exactly once. How well a metric foretells these losses is its rank correlation with them (METHOD of
IMPORTANCE: Spearman over groups and units; pieces, sums and intervals are ours).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import bootstrap, rankdata

from tdmpc_prune.analysis.config import SensitivityConfig
from tdmpc_prune.analysis.subject import Score, load_subject
from tdmpc_prune.errors import UserError
from tdmpc_prune.machine import measure_all, set_threads
from tdmpc_prune.pruning.groups import Structure
from tdmpc_prune.pruning.plan import Plan, plan_of
from tdmpc_prune.saving.files import png
from tdmpc_prune.words import plus_minus, table

RANKED, RANDOM = "least important first", "at random"
_RESAMPLES = 2000
LEVELS = ("groups", "pieces", "pieces within their group")


@dataclass(frozen=True)
class Removal:
    """Some units of one group: those from `start` to `stop`, as fractions, of an order."""

    group: str
    order: str  # RANKED or RANDOM
    start: float
    stop: float


@dataclass(frozen=True)
class Loss:
    """What a removal did."""

    removal: Removal
    units: int
    score: Score
    lost: float  # score of the whole network minus this
    importance: dict[str, float]  # metric → sum over the removed units


@dataclass(frozen=True)
class Correlation:
    """Spearman's, with a 95 % interval by resampling groups."""

    rho: float
    low: float
    high: float


@dataclass(frozen=True)
class Sensitivity:
    """All that was measured of a network."""

    score: str
    before: Score
    coupling: tuple[str, ...]  # names of the coupling groups
    losses: tuple[Loss, ...]
    correlations: dict[str, dict[str, Correlation]]  # metric → level; none of fewer than 3 groups


def removals(groups: Iterable[str], fractions: list[float]) -> list[Removal]:
    """Everything that is to be removed, each from the whole network."""
    found = []
    ends = [0.0, *fractions, 1.0]
    for group in groups:
        found += [Removal(group, RANKED, 0.0, fraction) for fraction in fractions]
        found += [Removal(group, RANDOM, 0.0, fraction) for fraction in fractions]
        # The first piece is the first fraction.
        found += [Removal(group, RANDOM, start, stop) for start, stop in pairwise(ends[1:])]
    return found


def measure(config: SensitivityConfig) -> Sensitivity:
    """Remove, measure, and correlate.

    Raises:
        UserError: there is no such checkpoint, or a group.
    """
    set_threads(config.threads)
    subject = load_subject(
        config.checkpoint, config.prune, config.episodes, config.seed, config.threads
    )
    structure = subject.structure
    groups = config.groups or list(structure.widths)
    if unknown := sorted(set(groups) - set(structure.widths)):
        raise UserError(
            f"groups: there is no '{unknown[0]}'; there are {', '.join(structure.widths)}"
        )
    densities = subject.densities
    orders = _orders(structure, densities[config.prune.method], config.seed)
    wanted = removals(groups, config.fractions)
    plans = [_plan(structure, orders[r.order], r) for r in wanted]
    scores = measure_all(
        (subject.measurement(plan) for plan in plans),
        len(plans),
        config.processes,
        config.threads,
        "removing",
    )
    ranges = dict(zip(structure.widths, _ranges(structure), strict=True))
    sizes = {name: structure.per_unit(name)[0] for name in structure.widths}
    losses = []
    for removal, plan, score in zip(wanted, plans, scores, strict=True):
        units = plan.removed.get(removal.group, [])
        importance = {
            metric: float(values[ranges[removal.group]][units].sum() * sizes[removal.group])
            for metric, values in densities.items()
        }
        lost = subject.before.mean - score.mean
        losses.append(Loss(removal, len(units), score, lost, importance))
    return Sensitivity(
        score=subject.score,
        before=subject.before,
        coupling=tuple(group.name for group in structure.groups if group.coupling),
        losses=tuple(losses),
        correlations={m: correlate(losses, m) for m in densities} if len(groups) > 2 else {},
    )


def _ranges(structure: Structure) -> list[slice]:
    """Where each group's units lie among all."""
    ends = np.cumsum([0, *structure.widths.values()])
    return [slice(a, b) for a, b in pairwise(ends)]


def _orders(
    structure: Structure, densities: np.ndarray, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Order → group → its units."""
    rng = np.random.default_rng(seed)
    parts = dict(zip(structure.widths, _ranges(structure), strict=True))
    return {
        RANKED: {name: np.argsort(densities[own], kind="stable") for name, own in parts.items()},
        RANDOM: {name: rng.permutation(width) for name, width in structure.widths.items()},
    }


def _plan(structure: Structure, order: dict[str, np.ndarray], removal: Removal) -> Plan:
    """Cut these units and no others; one unit of a group always stays."""
    width = structure.widths[removal.group]
    start, stop = (min(round(at * width), width) for at in (removal.start, removal.stop))
    chosen = order[removal.group][start:stop][: width - 1]
    rest = np.setdiff1d(order[removal.group], chosen)
    orders = order | {removal.group: np.concatenate([chosen, rest])}
    after = structure.widths | {removal.group: width - len(chosen)}
    return plan_of(
        structure, orders, after, ("ablation", removal.order), 0.0, structure.parameters()
    )


# --- What a metric foretells -----------------------------------------------------------------


def correlate(losses: list[Loss], metric: str) -> dict[str, Correlation]:
    """How alike a metric and the losses rank groups, and pieces of groups.

    Every piece of every group was missing once. A group's loss and importance are the means of its
    pieces'. Within their group, pieces count by how far they lie from its mean, in its standard
    deviations.
    """
    pieces: dict[str, list[tuple[float, float]]] = {}
    at_random = [loss for loss in losses if loss.removal.order == RANDOM]
    first = min(loss.removal.stop for loss in at_random)
    for loss in at_random:
        if loss.removal.start > 0 or loss.removal.stop == first:
            own = pieces.setdefault(loss.removal.group, [])
            own.append((loss.importance[metric], loss.lost))
    table = np.array(list(pieces.values()))  # [G, P, 2]
    means = table.mean(1)
    spread = table.std(1, keepdims=True)
    within = (table - means[:, None]) / np.where(spread > 0, spread, 1.0)
    views = (means[:, None], table, within)
    return {level: _interval(view) for level, view in zip(LEVELS, views, strict=True)}


def _interval(view: np.ndarray) -> Correlation:
    """Of `[G, P, 2]`: groups are resampled, all pieces of a group together."""

    def rho(chosen: np.ndarray, axis: int = -1) -> np.ndarray:  # Spearman's, of many at once
        pairs = view[chosen].reshape(*chosen.shape[:-1], -1, 2)
        ranks = rankdata(pairs, axis=-2)
        off = ranks - ranks.mean(-2, keepdims=True)
        products, squares = off.prod(-1).sum(-1), np.square(off).sum(-2).prod(-1)
        return np.where(squares == 0, 0.0, products / np.sqrt(np.where(squares == 0, 1, squares)))

    everything = np.arange(len(view))
    found = bootstrap(
        (everything,),
        rho,
        n_resamples=_RESAMPLES,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return Correlation(float(rho(everything)), float(low), float(high))


# --- Showing it ------------------------------------------------------------------------------


def curves(found: Sensitivity) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Order → group → (fraction removed, mean score) with nothing removed first."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {RANKED: {}, RANDOM: {}}
    for loss in found.losses:
        removal = loss.removal
        line = lines[removal.order].setdefault(removal.group, [(0.0, found.before.mean)])
        if removal.start == 0.0:
            line.append((removal.stop, loss.score.mean))
    return lines


def text(found: Sensitivity, config: SensitivityConfig) -> str:
    """The tables, as Markdown."""
    lines = curves(found)
    names = ["group", ""]
    names += [f"{order} {f:.0%}" for order in (RANKED, RANDOM) for f in config.fractions]
    rows = []
    for group in lines[RANKED]:
        values = [lines[order][group][1:] for order in (RANKED, RANDOM)]
        kind = "coupling" if group in found.coupling else ""
        rows.append([group, kind, *(f"{mean:.1f}" for line in values for _, mean in line)])
    # The most harmful first.
    rows.sort(key=lambda row: float(row[2 + len(config.fractions) - 1]))
    first = table(rows, names)
    rows = [
        [metric, *(f"{c.rho:.2f} [{c.low:.2f}, {c.high:.2f}]" for c in levels.values())]
        for metric, levels in found.correlations.items()
    ]
    second = table(rows, ["metric", *LEVELS])
    shown = (
        f"{found.score} after removing units, ranked by {config.prune.method}, nothing learnt "
        f"afterwards (at random: one random order); the whole network's is "
        f"{plus_minus(found.before.mean, found.before.interval)}\n\n{first}"
    )
    if not found.correlations:
        return f"{shown}\n\nToo few groups to correlate anything with them"
    return (
        f"{shown}\n\nRank correlation of importance with what the removal cost [95 % interval, "
        f"groups resampled]; a piece is what lies between two fractions of one random order, its "
        f"importance the sum over its units' parameters\n\n{second}"
    )


def as_json(found: Sensitivity, config: SensitivityConfig) -> dict:
    """Everything that was measured, and with which settings."""
    return {"settings": asdict(config)} | asdict(found)


def picture(found: Sensitivity, config: SensitivityConfig) -> bytes:
    """Score against the fraction removed, one line per group, coupling groups set apart; PNG."""
    lines = curves(found)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    groups = sorted(lines[RANKED], key=lambda group: group in found.coupling)
    colour = {group: f"C{i % 10}" for i, group in enumerate(groups)}
    for axis, order in zip(axes, (RANKED, RANDOM), strict=True):
        for i, group in enumerate(groups):
            x, y = zip(*lines[order][group], strict=True)
            special = group in found.coupling
            style = {"color": "black", "linewidth": 2.5} if special else {"color": colour[group]}
            axis.plot(
                x,
                y,
                "--" if i >= 10 and not special else "-",
                marker="s" if special else "o",
                markersize=4,
                label=f"{group} (coupling)" if special else group,
                **style,
            )
        axis.axhline(found.before.mean, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_xlabel("fraction of the group's units removed")
        title = f"{order}, by {config.prune.method}" if order == RANKED else order
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{found.score} without recovery")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)
