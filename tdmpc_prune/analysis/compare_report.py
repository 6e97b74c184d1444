"""Runs beside each other, shown: return against env steps, sparsity and planning MACs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from tdmpc_prune.analysis.compare import (
    Measured,
    Point,
    PruningPath,
    curves,
    dense_curves,
    paths,
    points,
)
from tdmpc_prune.saving.files import png
from tdmpc_prune.words import csv_text
from tdmpc_prune.words import table as markdown

_EQUAL_SPARSITY = 0.01  # arms that end further apart are not at equal sparsity
_EQUAL_ENV_STEPS = 0.02  # a fraction, for the last episode


def table(measured: list[Measured]) -> str:
    """What each arm reached after each of its cuts, as Markdown."""
    found = points(measured)
    dense = dense_curves(measured)
    rows = []
    for p in found:
        mean = float(np.mean(p.each)) if p.last else None
        each = f" ({', '.join(f'{value:.0f}' for value in p.each)})" if p.last else ""
        rows.append(
            (
                p.task,
                p.arm,
                p.cut,
                len(p.last),
                len(p.undone) or "",
                _shown(p.mean_of("env_steps"), ",.0f"),
                _shown(p.mean_of("sparsity"), ".3f"),
                _shown(p.mean_of("parameters"), ",.0f"),
                _shown(p.mean_of("macs"), ",.0f"),
                _shown(p.mean_of("decision_ms"), ".1f"),
                f"{_shown(mean, '.0f')}{each}",
                _of_dense(mean, p, dense) if mean is not None else "",
            )
        )
    names = ["task", "arm", "cuts", "runs", "undone in", "env steps", "sparsity", "parameters"]
    names += ["planning MACs", "ms", "return (each run)", "of dense"]
    text = markdown(rows, names)
    if any(m.decision_ms is not None for m in measured):
        text += (
            "\n\nms: CPU time per decision, measured at the end of a run, all its agents in turn;\n"
            "for runs of older releases wall time while they trained"
        )
    return text


def _of_dense(mean: float, point: Point, dense: dict[str, dict[float, float]]) -> str:
    """A return as a share of the dense runs' after as many env steps; else it says after how many.

    Nothing where the dense runs return nothing to compare with.
    """
    curve, now = dense.get(point.task, {}), point.mean_of("env_steps")
    if not curve:
        return ""
    at = min(curve, key=lambda env_steps: abs(env_steps - now))
    if curve[at] <= 0:
        return ""
    equal = abs(at - now) <= _EQUAL_ENV_STEPS * now
    return f"{mean / curve[at]:.0%}" + ("" if equal else f" (dense at {at:,.0f})")


def curve_table(measured: list[Measured]) -> str:
    """Every evaluation that all runs of an arm have in common, as Markdown."""
    rows = [
        (task, arm, f"{env_steps:,}", len(returns), f"{np.mean(returns):.0f}", each)
        for (task, arm), curve in curves(measured).items()
        for env_steps, returns in curve.items()
        for each in [", ".join(f"{value:.0f}" for value in returns)]
    ]
    names = ["task", "arm", "env steps", "runs", "return", "each run"]
    return markdown(rows, names)


def path_table(found: list[PruningPath]) -> str:
    """What the way there cost and where it led, as Markdown; and which arms are no equals."""
    arms: dict[tuple[str, str], list[PruningPath]] = defaultdict(list)
    for path in found:
        arms[path.task, path.arm].append(path)
    rows = []
    for (task, arm), own in arms.items():
        undone = [path.undone for path in own]
        trained = [path.end.env_steps - path.last_cut for path in own]
        sparsities = [path.end.sparsity for path in own]
        rows.append(
            (
                task,
                arm,
                len(own),
                f"{np.mean([path.cuts for path in own]):g}"
                + (f" ({np.mean(undone):g} undone)" if any(undone) else ""),
                _shown(None if None in sparsities else float(np.mean(sparsities)), ".3f"),
                f"{np.mean([path.end.env_steps for path in own]):,.0f}",
                f"{np.mean(trained):,.0f}",
                *(
                    f"{np.mean(each):.0f} ({', '.join(f'{value:.0f}' for value in each)})"
                    for each in (
                        [path.before for path in own],
                        [path.lowest for path in own],
                        [path.end.mean for path in own],
                    )
                ),
            )
        )
    names = ["task", "arm", "runs", "cuts", "sparsity at the end", "env steps"]
    names += [
        "of them after the last cut",
        "return before",
        "lowest right after a cut",
        "at the end",
    ]
    return "\n".join([markdown(rows, names), *_unequal(found)])


def _unequal(found: list[PruningPath]) -> Iterable[str]:
    """A line for each task whose arms do not end at the same sparsity and env steps."""
    for task in dict.fromkeys(path.task for path in found):
        own = [path for path in found if path.task == task]
        sparsities = [path.end.sparsity or 0.0 for path in own]
        env_steps = [path.end.env_steps for path in own]
        if max(sparsities) - min(sparsities) > _EQUAL_SPARSITY:
            yield (
                f"\n{task}: not at equal sparsity ({min(sparsities):.3f} to "
                f"{max(sparsities):.3f}); returns at the end are of networks of different size"
            )
        if max(env_steps) - min(env_steps) > _EQUAL_ENV_STEPS * max(env_steps):
            yield f"\n{task}: not at equal env steps ({min(env_steps):,} to {max(env_steps):,})"


def path_picture(measured: list[Measured]) -> bytes:
    """Every measurement of every run that was cut: return and sparsity against env steps; PNG."""
    runs: dict[tuple[str, str], dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for m in measured:
        runs[m.task, m.arm][m.run].append(m)
    cut = {path.run for path in paths(measured)}
    tasks = sorted({m.task for m in measured if m.run in cut})
    arms = sorted({m.arm for m in measured if m.run in cut})
    figure = Figure(figsize=(10, 0.8 + 5 * len(tasks)), layout="constrained")
    rows = figure.subplots(2 * len(tasks), 1, squeeze=False, height_ratios=(3, 1.5) * len(tasks))
    for i, task in enumerate(tasks):
        top, bottom = rows[2 * i][0], rows[2 * i + 1][0]
        for colour, arm in enumerate(arms):
            for own in (way for run, way in runs[task, arm].items() if run in cut):
                x, style = [m.env_steps for m in own], {"color": f"C{colour}", "alpha": 0.7}
                top.plot(x, [m.mean for m in own], linewidth=1, **style)
                dips = [m for m in own if m.moment == "after"]
                top.plot([m.env_steps for m in dips], [m.mean for m in dips], "v", **style)
                bottom.plot(x, [m.sparsity or 0.0 for m in own], drawstyle="steps-post", **style)
        top.set_ylabel(f"{task}: return")
        top.set_ylim(bottom=min(0, top.get_ylim()[0]))
        bottom.set_ylabel("sparsity")
        bottom.set_xlabel("env steps (simulator steps); a line for each run; right after a cut: ▼")
        bottom.sharex(top)
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
        short_ticks(bottom)
    lines = [rows[0][0].plot([], [], color=f"C{i}", label=arm)[0] for i, arm in enumerate(arms)]
    figure.legend(handles=lines, loc="outside lower center", fontsize=8)
    return png(figure)


def as_csv(measured: list[Measured]) -> str:
    """One line for each episode of each measurement."""
    names = ("task", "arm", "seed", "run", "env_steps", "moment", "cut", "sparsity")
    names += ("parameters", "macs", "decision_ms")
    rows = (
        [*(getattr(m, name) for name in names), i, f"{value:.3f}"]
        for m in measured
        for i, value in enumerate(m.returns)
    )
    return csv_text(rows, [*names, "episode", "episode_return"])


def picture(measured: list[Measured]) -> bytes:
    """A row for each task: return against env steps, sparsity, and planning MACs, as PNG.

    Error bars and bands span the runs of an arm. A cut that a run undid is a cross.
    """
    tasks = sorted({m.task for m in measured})
    arms = sorted({m.arm for m in measured}, key=lambda arm: (not arm.startswith("dense"), arm))
    colour = {arm: f"C{i % 10}" for i, arm in enumerate(arms)}
    found, evaluated = points(measured), curves(measured)
    figures = {"sparsity": "sparsity", "macs": "planning MACs"}
    known = [name for name in figures if any(p.mean_of(name) is not None for p in found)]
    figure = Figure(figsize=(4 + 4 * len(known), 0.6 + 3.4 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), 1 + len(known), squeeze=False)
    for row, task in zip(rows, tasks, strict=True):
        for arm in arms:
            own = [p for p in found if (p.task, p.arm) == (task, arm)]
            _draw_curve(row[0], evaluated.get((task, arm), {}), colour[arm])
            for axis, name in zip(row[1:], known, strict=True):
                _draw_points(axis, own, name, colour[arm])
        row[0].set_ylabel(f"{task}: return")
        row[0].set_xlim(left=0)
        labels = ["env steps (simulator steps)", *(figures[name] for name in known)]
        for axis, label in zip(row, labels, strict=True):
            axis.set_xlabel(label)
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            axis.grid(alpha=0.3)
        low, high = row[-1].get_xlim()
        if "macs" in known and high > 5 * max(low, 1e-9):
            row[-1].set_xscale("log")
        for axis in (row[0], *(row[-1:] if "macs" in known else [])):
            short_ticks(axis)
    lines = [figure.axes[0].plot([], [], "o-", color=colour[arm], label=arm)[0] for arm in arms]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=8)
    return png(figure)


def _draw_curve(axis: Axes, curve: dict[int, list[float]], colour: str) -> None:
    if curve:
        each = list(curve.values())
        axis.plot(list(curve), [np.mean(e) for e in each], "o-", color=colour, markersize=3)
        low, high = [min(e) for e in each], [max(e) for e in each]
        axis.fill_between(list(curve), low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_points(axis: Axes, own: list[Point], name: str, colour: str) -> None:
    """A line through the cuts, hollow where a run of the arm undid it; those are crosses."""
    known = [(p.mean_of(name), p) for p in own if p.mean_of(name) is not None]
    placed = sorted(known, key=lambda pair: pair[0])
    x = [at for at, _ in placed]
    mean = np.array([np.mean(p.each) for _, p in placed])
    if placed:
        low = mean - [min(p.each) for _, p in placed]
        high = [max(p.each) for _, p in placed] - mean
        axis.errorbar(x, mean, [low, high], color=colour)
    for at, middle, (_, p) in zip(x, mean, placed, strict=True):
        inside = "white" if p.undone else colour
        axis.plot(at, middle, "o", color=colour, markersize=5, markerfacecolor=inside)
    for m in (m for p in own for m in p.undone):
        if getattr(m, name) is not None:
            axis.plot(getattr(m, name), m.mean, "x", color=colour, markersize=5)


def short_ticks(axis: Axes) -> None:
    """Few and short labels on an axis of large numbers: 50 k, 200 k, 1 M."""
    if axis.get_xscale() == "log":
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(EngFormatter())


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
