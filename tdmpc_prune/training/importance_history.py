"""How importance moved between the groups during a pruning run: pictures, and a summary in words.

IMPORTANCE claims that importance shifts while an agent learns, and that coupling groups are not
always the most critical; this is where a run's own `history.jsonl` answers. A group's importance is
the mean, over the units that are left of it, of importance per parameter. Part of what moves it is
the pruning itself: a cut takes the least important units and so raises the mean, and evidence is
weighed towards the historical as the schedule goes on. Before the first cut neither is the case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.config import GRADIENT_METRICS
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.ranks import ranks, spearman
from tdmpc_prune.saving.run_folder import RunFolder

if TYPE_CHECKING:  # drawing is slow to import, and who trains may not draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 3  # groups that a summary names at most


@dataclass(frozen=True)
class ImportanceHistory:
    """Importance of G groups at T times, by metric."""

    unit: str  # of time: env_steps or updates
    times: np.ndarray  # [T]
    groups: tuple[str, ...]
    coupling: tuple[str, ...]  # those groups that lie in several components
    values: dict[str, np.ndarray]  # metric → [G, T]; NaN where a group was none any more
    cuts: tuple[float, ...]  # times
    undone: int  # of them

    def ranks(self, metric: str) -> np.ndarray:
        """`[G, T]`: 1 is the most important group of that time."""
        return np.stack([ranks(-column) for column in self.values[metric].T], axis=1)

    def changes(self, metric: str) -> np.ndarray:
        """`[G, T]`: where a group's rank is not what it was one time before."""
        ranks = self.ranks(metric)
        moved = (ranks[:, 1:] != ranks[:, :-1]) & ~np.isnan(ranks[:, 1:])
        return np.pad(moved, ((0, 0), (1, 0)))


def read(run_dir: Path) -> ImportanceHistory:
    """The importance that a pruning run has logged.

    Raises:
        UserError: it has logged none.
    """
    records = RunFolder(run_dir).read_history("importance")
    if not records:
        raise UserError(f"'{run_dir}' has no history of importance; only pruning runs have one")
    unit = next(name for name in ("env_steps", "updates") if name in records[0])
    groups = tuple(dict.fromkeys(g for r in records for v in r["groups"].values() for g in v))
    # What is drawn at random tells nothing, unless there is nothing else.
    metrics = [m for m in records[0]["groups"] if m != "random"] or ["random"]
    plans = sorted(run_dir.glob("plans/step-*.json"))
    homes = Plan.load(plans[0]).homes if plans else {}
    return ImportanceHistory(
        unit=unit,
        times=np.array([record[unit] for record in records], float),
        groups=groups,
        coupling=tuple(group for group, home in homes.items() if home == "coupling"),
        values={
            metric: np.array(
                [[r["groups"][metric].get(group, np.nan) for r in records] for group in groups]
            )
            for metric in metrics
        },
        cuts=tuple(entry[unit] for entry in RunFolder(run_dir).read_history("cut")),
        undone=len(RunFolder(run_dir).read_history("undone")),
    )


def summary(history: ImportanceHistory) -> str:
    """In words: which groups rose and fell, by how much the ranking moved, and the coupling."""
    count = len(history.times)
    unit = history.unit.replace("_", " ")
    lines = [
        f"{count} times from {history.times[0]:.0f} to {history.times[-1]:.0f} {unit}, "
        f"{len(history.groups)} groups, {len(history.cuts)} cuts ({history.undone} undone); "
        f"start and end are the means of the first and last quarter",
    ]
    if count < 4:
        return f"{lines[0]}\ntoo few times to say how importance moved"
    lines += [f"{metric}: {_moves(history, metric)}" for metric in history.values]
    gradient = [metric for metric in history.values if metric in GRADIENT_METRICS]
    if gradient and len(history.groups) > 2:
        lines.append(_before_cuts(history, gradient))
        lines.append(_verdict(history, gradient))
    return "\n".join(lines)


def _moves(history: ImportanceHistory, metric: str) -> str:
    ranks = history.ranks(metric)
    start, end = _quarters(ranks)
    order = np.argsort(start - end, kind="stable")
    moved = {history.groups[i]: (start[i], end[i]) for i in order}

    def named(pairs: list[tuple[str, tuple[float, float]]]) -> str:
        shown = [f"{name} (rank {a:.1f} to {b:.1f})" for name, (a, b) in pairs[:_NAMED]]
        return ", ".join(shown) or "none"

    rose = [(name, pair) for name, pair in moved.items() if pair[0] - pair[1] >= 1][::-1]
    fell = [(name, pair) for name, pair in moved.items() if pair[1] - pair[0] >= 1]
    steps = history.changes(metric)[:, 1:].any(0)
    return (
        f"rose {named(rose)}; fell {named(fell)}; the order changed between "
        f"{int(steps.sum())} of {len(steps)} neighbouring times, start and end correlate with "
        f"{_agreement(start, end):.2f}{_of_coupling(history, ranks)}"
    )


def _quarters(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean rank of each group in the first and in the last quarter of the times."""
    part = max(1, ranks.shape[1] // 4)
    found = []
    for quarter in (ranks[:, :part], ranks[:, -part:]):
        known = ~np.isnan(quarter)
        total = np.where(known, quarter, 0).sum(1)
        found.append(np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan))
    return found[0], found[1]


def _agreement(start: np.ndarray, end: np.ndarray) -> float:
    known = ~(np.isnan(start) | np.isnan(end))
    return spearman(start[known], end[known]) if known.sum() > 2 else np.nan


def _before_cuts(history: ImportanceHistory, metrics: list[str]) -> str:
    """How far the ranking moved while nothing had been cut yet."""
    before = history.times < (history.cuts[0] if history.cuts else np.inf)
    if before.sum() < 2:
        return "before the first cut importance was logged less than twice"
    ranks = [history.ranks(metric)[:, before] for metric in metrics]
    found = [_agreement(own[:, 0], own[:, -1]) for own in ranks]
    return (
        f"before the first cut ({int(before.sum())} times): first and last correlate with "
        f"{min(found):.2f} to {max(found):.2f} over the gradient metrics"
    )


def _of_coupling(history: ImportanceHistory, ranks: np.ndarray) -> str:
    parts = []
    for group in history.coupling:
        own = ranks[history.groups.index(group)]
        led = int((own == 1).sum())
        parts.append(
            f"; the coupling group {group} led at {led} of {len(own)} times "
            f"(mean rank {np.nanmean(own):.1f} of {len(history.groups)})"
        )
    return "".join(parts)


def _verdict(history: ImportanceHistory, metrics: list[str]) -> str:
    """What the gradient metrics together say of the published claims."""
    agreements = [_agreement(*_quarters(history.ranks(metric))) for metric in metrics]
    if np.isnan(agreements).any():
        return "in this run: too few groups lasted to say whether importance shifted"
    text = (
        f"in this run: importance {'shifted' if min(agreements) < 0.9 else 'hardly shifted'} "
        f"(start against end, over the {len(metrics)} gradient metrics: "
        f"{min(agreements):.2f} to {max(agreements):.2f})"
    )
    if history.coupling:
        places = [history.groups.index(group) for group in history.coupling]
        led = [(history.ranks(metric)[places] == 1).any(0).mean() for metric in metrics]
        always = "always" if min(led) == 1 else "never" if max(led) == 0 else "not always"
        text += (
            f"; the coupling group was {always} the most critical "
            f"({min(led):.0%} to {max(led):.0%} of the times)"
        )
    return text


def as_csv(history: ImportanceHistory) -> str:
    """What is drawn: a line for each metric, group and time."""
    lines = [f"metric,group,{history.unit},importance,rank"]
    for metric, values in history.values.items():
        ranks = history.ranks(metric)
        for g, group in enumerate(history.groups):
            for t, time in enumerate(history.times):
                lines.append(f"{metric},{group},{time:g},{values[g, t]:.6g},{ranks[g, t]:g}")
    return "\n".join(lines) + "\n"


def draw(history: ImportanceHistory) -> Figure:
    """For each metric, importance and rank of each group against time; moves of rank are dotted.

    Cuts are lines with a dark rim, for light and dark cells, and triangles above them: the first
    one may lie at the very edge.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    metrics = list(history.values)
    names = [f"{g} (coupling)" if g in history.coupling else g for g in history.groups]
    # Placed in inches: a layout that is worked out takes longer than all that is drawn.
    row, above, below = 0.18 * len(history.groups), 0.5, 0.6
    width, height = 13, (row + above) * len(metrics) + below
    figure = Figure(figsize=(width, height))
    rows = figure.subplots(
        len(metrics),
        2,
        sharex=True,
        sharey=True,
        squeeze=False,
        gridspec_kw={
            "left": (0.2 + 0.055 * max(map(len, names))) / width,
            "right": 1 - 0.3 / width,
            "bottom": below / height,
            "top": 1 - above / height,
            "hspace": above / row,
            "wspace": 0.06,
        },
    )
    places, beside = np.arange(len(history.groups)), {"fraction": 0.06, "pad": 0.03}
    all_ranks = {"cmap": "viridis_r", "vmin": 1, "vmax": max(2, len(history.groups))}
    for (left, right), metric in zip(rows, metrics, strict=True):
        values = history.values[metric]
        positive = np.ma.masked_where(~(values > 0), values)
        norm = None
        if positive.count() and positive.min() < positive.max():
            norm = LogNorm(positive.min(), positive.max())
        image = left.pcolormesh(history.times, places, positive, norm=norm, shading="nearest")
        figure.colorbar(image, ax=left, **beside)
        left.set_title(f"{metric}: importance per parameter", fontsize=9, pad=8)
        ranks = np.ma.masked_invalid(history.ranks(metric))
        image = right.pcolormesh(history.times, places, ranks, shading="nearest", **all_ranks)
        title = f"{metric}: rank (1 is the most important; dots: it changed)"
        right.set_title(title, fontsize=9, pad=8)
        group, time = np.nonzero(history.changes(metric))
        right.plot(history.times[time], places[group], ".", color="C3", markersize=3)
        for axis in (left, right):
            _mark_cuts(axis, history)
    figure.colorbar(image, ax=rows[:, 1].tolist(), aspect=20 * len(metrics), **beside)
    rows[0, 0].set_yticks(places, names)
    for axis in rows[:, 0]:
        axis.tick_params(axis="y", labelsize=7)
    rows[0, 0].invert_yaxis()
    for axis in rows[-1]:
        axis.set_xlabel(f"{history.unit.replace('_', ' ')} (lines with ▼: cuts)")
    return figure


def _mark_cuts(axis: Axes, history: ImportanceHistory) -> None:
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2, foreground="black")]
    cuts, above = list(history.cuts), axis.get_xaxis_transform()  # y: a part of the axis' height
    axis.vlines(cuts, 0, 1, color="white", linewidth=0.8, path_effects=rim, transform=above)
    ends = {"color": "C3", "markersize": 5, "clip_on": False, "transform": above}
    axis.plot(cuts, [1] * len(cuts), "v", **ends)
    low, high = axis.get_xlim()
    axis.set_xlim(min([low, *history.cuts]), max([high, *history.cuts]))
