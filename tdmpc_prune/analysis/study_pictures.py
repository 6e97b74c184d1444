"""What a study found, in pictures, from its results alone."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tdmpc_prune.analysis.arms import ARMS, CUTS, DENSE, SMALL
from tdmpc_prune.analysis.study_report import (
    FEWEST,
    READINGS,
    Result,
    ending,
    interquartile_mean,
    iqm_interval,
    no_budget,
    shown,
    strata_of,
)
from tdmpc_prune.saving.files import png

_LEGEND_COLUMN = 2.4  # inches
_BAND = 0.6  # width of what is drawn at one sparsity, in halvings of the parameters


def pictures(results: list[Result]) -> dict[str, bytes]:
    """Name → PNG; the first answers the question."""
    return {
        "answer": png(_answer(results)),
        "sparsity": png(_against_sparsity(results)),
        "profile": png(_profiles(results)),
        "cost": png(_against_cost(results)),
    }


def _answer(results: list[Result]) -> Figure:
    """Return at the end against sparsity, five arms at most beside the dense one.

    A panel for each task; interquartile means and 95 % intervals over the seeds, where there are
    enough; the dense level is a line with its interval, its 95 % another.
    """
    tasks = list(dict.fromkeys(r.task for r in results))
    columns = min(len(tasks), 2)
    size = (1 + 5.2 * columns, 1.2 + 3.8 * -(-len(tasks) // columns))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(-(-len(tasks) // columns), columns, squeeze=False).flatten()
    for axis in axes[len(tasks) :]:
        axis.remove()
    arms = shown(results)
    for axis, task in zip(axes, tasks, strict=False):
        own = [r for r in results if r.task == task]
        asked = sorted({r.asked for r in own if r.asked is not None})
        dense = np.array(list({r.seed: r.before for r in own}.values()))
        middle, low, high = _middle(dense)
        axis.axhline(middle, color="black", linewidth=1, label=DENSE)
        axis.axhline(0.95 * middle, color="black", linewidth=1, linestyle=":", label="95 % of it")
        axis.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
        for place, arm in enumerate(arms):
            ends = defaultdict(list)
            for r in own:
                if r.arm == arm:
                    ends[r.asked].append(r.end)
            found = {a: _middle(np.array(ends[a])) for a in sorted(ends)}
            x = [_place(a, 0.6 * ((place + 0.5) / len(arms) - 0.5)) for a in found]
            y, bottom, top = np.array(list(found.values())).reshape(-1, 3).T
            errors = [y - bottom, top - y]
            axis.errorbar(x, y, errors, fmt="o-", color=f"C{place}", ms=5, capsize=2, label=arm)
        axis.set_title(task)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.set_ylabel(ending(results))
        axis.set_xticks([_place(a, 0.0) for a in asked], [f"{a:g}" for a in asked])
        axis.set_xlabel("sparsity (axis: log of the parameters left)")
        axis.grid(alpha=0.3, axis="y")
    _legend(figure)
    return figure


def _middle(values: np.ndarray) -> tuple[float, float, float]:
    """Interquartile mean and its interval; of too few values without one."""
    middle, low, high = iqm_interval([values])
    return (middle, low, high) if len(values) >= FEWEST else (middle, middle, middle)


def _colours(results: list[Result]) -> dict[str, str]:
    """A colour for each arm; one that is refitted has that of the same cut without it."""
    arms = [arm for arm in ARMS if any(r.arm == arm for r in results)]
    families = list(dict.fromkeys(map(_family, arms)))
    twenty = colormaps["tab20"].colors
    colours = [*twenty[::2], *twenty[1::2]]  # strong ones first
    return {
        arm: "black" if arm == DENSE else colours[families.index(_family(arm)) % 20] for arm in arms
    }


def _family(arm: str) -> str:
    return arm.removesuffix(" refitted").removesuffix(" plain")


def _line(arm: str) -> str:
    """Dashed for a cut without a refit."""
    return "--" if arm in CUTS and not CUTS[arm].refit else "-"


def _against_sparsity(results: list[Result]) -> Figure:
    """The three readings against sparsity, a row for each task; and every run as a point.

    The axis is one of numbers, the logarithm of the parameters left; in each band are the arms of
    one sparsity beside each other, else equal ones hide each other.
    """
    tasks = list(dict.fromkeys(r.task for r in results))
    readings = {
        "return right after the cut": lambda r: r.after,
        "share of runs back at 95 %": lambda r: (
            None if r.arm == SMALL else float(r.recovery is not None)
        ),
        "return at the end of the budget": lambda r: r.end,
    }
    if no_budget(results):
        readings = {ending(results): lambda r: r.end}
    size = (14 if len(readings) > 1 else 9, 1 + 3.6 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    rows = figure.subplots(len(tasks), len(readings), squeeze=False, sharex=True)
    colours = _colours(results)
    cut = [arm for arm in colours if arm != DENSE]
    for row, task in zip(rows, tasks, strict=True):
        asked = sorted({r.asked for r in results if r.task == task and r.asked is not None})
        for axis, (name, read) in zip(row, readings.items(), strict=True):
            for sparsity in asked:
                axis.axvspan(*_place(sparsity, [-0.5, 0.5]), color="0.5", alpha=0.1, linewidth=0)
            for arm, colour in colours.items():
                points = defaultdict(list)
                for r in results:
                    if (r.task, r.arm) == (task, arm) and read(r) is not None:
                        points[r.asked].append(read(r))
                shift = (cut.index(arm) + 0.5) / len(cut) - 0.5 if arm in cut else 0.0
                places = {sparsity: _place(sparsity, shift) for sparsity in asked}
                middle = np.mean if name.startswith("share") else interquartile_mean
                _draw_readings(axis, points, places, middle, arm, colour)
            axis.set_title(f"{task}: {name}", fontsize=9)
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            axis.grid(alpha=0.3, axis="y")
    every = sorted({r.asked for r in results if r.asked is not None})
    for axis in rows[-1]:
        ticks = [_place(sparsity, 0.0) for sparsity in every]
        axis.set_xticks(ticks, [f"{sparsity:g}" for sparsity in every])
        axis.set_xlabel("sparsity (axis: log of the parameters left)")
    _legend(figure)
    return figure


def _place(sparsity: float, shift: float | list[float]) -> np.ndarray:
    """Where a sparsity lies, in halvings of the parameters; `shift` in widths of its band."""
    return -np.log2(1 - sparsity) + _BAND * np.asarray(shift)


def _draw_readings(axis, points: dict, places: dict, middle, arm: str, colour: str) -> None:
    """One arm: sparsity → values, and sparsity → x."""
    if arm == DENSE:
        if points:
            axis.axhline(middle(np.array(points[None])), color=colour, linestyle=":", label=arm)
        return
    x = [places[sparsity] for sparsity in sorted(points)]
    values = [np.array(points[sparsity]) for sparsity in sorted(points)]
    axis.plot(x, [middle(v) for v in values], f"o{_line(arm)}", color=colour, ms=5, label=arm)
    for at, own_values in zip(x, values, strict=True):
        axis.plot([at] * len(own_values), own_values, ".", color=colour, alpha=0.4, ms=4)


def _profiles(results: list[Result]) -> Figure:
    """Share of runs that keep more than tau of the dense return, over all sparsities of a task."""
    tasks = list(dict.fromkeys(r.task for r in results))
    readings = {"right after": "right after the cut", "end": "at the end of the budget"}
    if no_budget(results):
        readings = {"end": "right after the cut"}
    figure = Figure(figsize=(11, 1 + 3.4 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), len(readings), squeeze=False, sharex=True, sharey=True)
    colours, taus = _colours(results), np.linspace(0, 1.2, 121)
    for row, task in zip(rows, tasks, strict=True):
        strata, _ = strata_of([r for r in results if r.task == task])
        for axis, (reading, name) in zip(row, readings.items(), strict=True):
            for arm, cells in strata.items():
                runs = [
                    r for cell in cells for r in cell if r.after is not None or reading == "end"
                ]
                kept = np.array([READINGS[reading](r) for r in runs])
                if len(kept):
                    shares = [(kept > tau).mean() for tau in taus]
                    axis.plot(taus, shares, _line(arm), color=colours[arm], label=arm)
            axis.set_title(f"{task}: {name}", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("share of runs above tau")
    for axis in rows[-1]:
        axis.set_xlabel("tau, fraction of the dense return")
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """One for all axes."""
    handles = {}
    for axis in figure.axes:
        own, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, own, strict=True))
    columns = max(1, min(5, int(figure.get_figwidth() // _LEGEND_COLUMN)))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8)


def _against_cost(results: list[Result]) -> Figure:
    """Return at the end against parameters, planning MACs and milliseconds per decision."""
    tasks = list(dict.fromkeys(r.task for r in results))
    costs = {
        "parameters": lambda r: r.parameters,
        "million planning MACs": lambda r: r.macs / 1e6,
        "ms per decision": lambda r: r.decision_ms,
    }
    figure = Figure(figsize=(14, 1 + 3.6 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), len(costs), squeeze=False, sharey="row")
    colours = _colours(results)
    for row, task in zip(rows, tasks, strict=True):
        for axis, (name, cost) in zip(row, costs.items(), strict=True):
            for arm, colour in colours.items():
                own = [r for r in results if (r.task, r.arm) == (task, arm)]
                x, y = [cost(r) for r in own], [r.end for r in own]
                axis.plot(x, y, "o", color=colour, markersize=4, alpha=0.6, label=arm)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{task}\n{ending(results)}")
    _legend(figure)
    return figure
