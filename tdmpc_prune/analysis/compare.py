"""Runs beside each other: return against env steps, sparsity and planning MACs.

Everything comes from the runs' folders: `run.json` and `history.jsonl`. Runs that differ in nothing
but their seed, and what follows from it, are one arm.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from tabulate import tabulate

from tdmpc_prune.errors import UserError
from tdmpc_prune.saving.files import png
from tdmpc_prune.saving.run_folder import read_history, read_run
from tdmpc_prune.settings import by_dotted_name, from_plain, to_plain
from tdmpc_prune.training.config import TrainConfig

_NOT_OF_THE_ARM = {
    *("seed", "run_dir", "resume", "device", "threads", "prune.method", "prune.plan", "task"),
    "start_from",
}
_EQUAL_SPARSITY = 0.01  # arms that end further apart are not at equal sparsity
_EQUAL_ENV_STEPS = 0.02  # a fraction, for the last episode
_PASSING = ("after", "recovering", "not recovered")  # moments in which a cut is not settled


@dataclass(frozen=True)
class Measured:
    """One measurement of the return in one run."""

    task: str
    arm: str
    seed: int
    run: str  # its folder
    env_steps: int
    due: int  # the same for all seeds: an evaluation comes with the first episode that ends later
    moment: str  # "evaluation", or where in a cut: before, after, recovering, (not) recovered
    cut: int  # the cut that left these networks; 0 for the ones that the run started with
    sparsity: float | None  # None in the history of older releases, like the next three
    parameters: int | None
    macs: int | None  # multiply-accumulates of one decision
    decision_ms: float | None  # CPU time at the run's end; wall time meanwhile in older releases
    returns: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The folders of agents' runs among `paths` and below them; an autoencoder has no return.

    Raises:
        UserError: a path holds none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        runs = sorted(file.parent for file in path.glob("**/run.json"))
        runs = [run for run in runs if "task" in read_run(run)]
        if not runs:
            raise UserError(f"'{path}' is not the folder of an agent's run and holds none")
        found |= dict.fromkeys(runs)
    return list(found)


def read(run_dirs: list[Path]) -> tuple[list[Measured], list[Path]]:
    """Every measurement of the runs, and the runs that have none yet."""
    # Read through the schema, so that settings which older releases did not have are filled in.
    settings = {
        run_dir: to_plain(from_plain(TrainConfig, read_run(run_dir))) for run_dir in run_dirs
    }
    arms = _arms(settings)
    measured, without = [], []
    for run_dir in run_dirs:
        own = list(_read_one(run_dir, settings[run_dir], arms[run_dir]))
        measured += own
        if not own:
            without.append(run_dir)
    return measured, without


def _read_one(run_dir: Path, settings: dict[str, Any], arm: str) -> Iterable[Measured]:
    cut, kept, every = 0, 0, settings["eval_every"]
    timed = {
        name: agent["decision_ms"]["median"]
        for entry in read_history(run_dir, "times")
        for name, agent in entry["agents"].items()
    }
    for entry in read_history(run_dir, "evaluation", "tracking", "cut", "undone"):
        if entry["kind"] == "cut":
            cut, kept = entry["step"], cut
        elif entry["kind"] == "undone":
            cut = kept
        else:
            yield Measured(
                task=settings["task"],
                arm=arm,
                seed=settings["seed"],
                run=str(run_dir),
                env_steps=entry["env_steps"],
                due=entry["env_steps"] // every * every,
                moment=entry.get("moment", "evaluation"),
                cut=cut,
                sparsity=entry.get("sparsity"),
                parameters=entry.get("parameters"),
                macs=entry.get("macs", entry.get("planning_macs")),
                decision_ms=timed.get(f"step-{cut}" if cut else "dense", entry.get("decision_ms")),
                returns=tuple(entry["returns"]),
            )


def _arms(settings: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """A name for each run: its pruning method, and what else sets it apart from the others.

    Settings are compared among the runs of one task; pruning settings, among those of one method.
    """
    flat = {run_dir: by_dotted_name(values) for run_dir, values in settings.items()}
    names = {}
    for run_dir, own in flat.items():
        method, finished = own["prune.method"], bool(own["start_from"])
        parts = ["dense" if method == "none" else method]
        skipped = set(_NOT_OF_THE_ARM)
        if finished:
            parts.append("of a finished agent")
            skipped.add("env_steps")  # counted from the agent's, which differ from seed to seed
        for name, value in own.items():
            rivals = [other for other in flat.values() if other["task"] == own["task"]]
            if name.startswith("prune."):
                if method == "none":
                    continue
                rivals = [other for other in rivals if other["prune.method"] == method]
            elif name == "env_steps":
                rivals = [other for other in rivals if not other["start_from"]]
            if name not in skipped and any(other.get(name) != value for other in rivals):
                parts.append(f"{name}={value}")
        names[run_dir] = " ".join(parts)
    return names


@dataclass(frozen=True)
class Point:
    """What an arm was after one of its cuts."""

    task: str
    arm: str
    cut: int
    last: list[Measured]  # of each run that kept it: the last settled one with these networks
    undone: list[Measured]  # of each run that undid it: the one that decided so

    def mean_of(self, name: str) -> float | None:
        """Mean over the runs of a figure; None if a run does not have it."""
        values = [getattr(measured, name) for measured in self.last]
        return None if None in values or not values else float(np.mean(values))

    @property
    def each(self) -> list[float]:
        """Mean return of each run."""
        return [measured.mean for measured in self.last]


def points(measured: list[Measured]) -> list[Point]:
    """One for each arm and cut, in order; their runs by seed."""
    last: dict[tuple[str, str, int], dict[str, Measured]] = defaultdict(dict)
    undone: dict[tuple[str, str, int], dict[str, Measured]] = defaultdict(dict)
    for m in sorted(measured, key=lambda m: (m.task, m.arm, m.cut, m.seed)):
        if m.moment not in _PASSING:
            last[m.task, m.arm, m.cut][m.run] = m
        elif m.moment == "not recovered":
            undone[m.task, m.arm, m.cut][m.run] = m
    return [
        Point(*key, list(last[key].values()), list(undone[key].values()))
        for key in sorted({*last, *undone})
    ]


def table(measured: list[Measured]) -> str:
    """What each arm reached after each of its cuts, as Markdown."""
    found = points(measured)
    curves = _dense_curves(measured)
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
                _of_dense(mean, p, curves) if mean is not None else "",
            )
        )
    names = ["task", "arm", "cuts", "runs", "undone in", "env steps", "sparsity", "parameters"]
    names += ["planning MACs", "ms", "return (each run)", "of dense"]
    text = tabulate(rows, names, "pipe", disable_numparse=True)
    if any(m.decision_ms is not None for m in measured):
        text += (
            "\n\nms: CPU time per decision, measured at the end of a run, all its agents in turn; "
            "for runs of older releases wall time while they trained"
        )
    return text


def _dense_curves(measured: list[Measured]) -> dict[str, dict[float, float]]:
    """Task → env steps → mean return of its dense runs, where all of them were evaluated.

    With several dense arms there is no saying which is the reference.
    """
    curves = _curves(measured)
    found = {}
    for task in {m.task for m in measured}:
        dense = [arm for own, arm in curves if own == task and arm.startswith("dense")]
        if len(dense) == 1:
            evaluated: dict[int, list[int]] = defaultdict(list)
            for m in measured:
                if (m.task, m.arm, m.moment) == (task, dense[0], "evaluation"):
                    evaluated[m.due].append(m.env_steps)
            found[task] = {
                float(np.mean(evaluated[due])): float(np.mean(each))
                for due, each in curves[task, dense[0]].items()
            }
    return found


def _of_dense(mean: float, point: Point, curves: dict[str, dict[float, float]]) -> str:
    """A return as a share of the dense runs' after as many env steps; else it says after how many.

    Nothing where the dense runs return nothing to compare with.
    """
    curve, now = curves.get(point.task, {}), point.mean_of("env_steps")
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
        for (task, arm), curve in _curves(measured).items()
        for env_steps, returns in curve.items()
        for each in [", ".join(f"{value:.0f}" for value in returns)]
    ]
    names = ["task", "arm", "env steps", "runs", "return", "each run"]
    return tabulate(rows, names, "pipe", disable_numparse=True)


# --- The path of pruning ---------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """The way of one run from its first cut to its end."""

    task: str
    arm: str
    run: str
    cuts: int
    undone: int  # of them
    before: float  # return before the first cut
    lowest: float  # the lowest return right after a cut
    last_cut: int  # env steps at the last that was kept
    end: Measured  # the last settled measurement


def paths(measured: list[Measured]) -> list[Course]:
    """Of every run that was cut, in order of arm and seed."""
    runs: dict[tuple[str, str, int, str], list[Measured]] = defaultdict(list)
    for m in measured:
        runs[m.task, m.arm, m.seed, m.run].append(m)
    found = []
    for (task, arm, _, run), own in sorted(runs.items()):
        cut = [m for m in own if m.moment == "after"]
        before = [m.mean for m in own if m.moment == "before"]
        if cut and before:
            end = [m for m in own if m.moment not in _PASSING][-1]
            lowest = min(m.mean for m in cut)
            undone = sum(m.moment == "not recovered" for m in own)
            kept = [m.env_steps for m in cut if m.cut <= end.cut]
            last = (kept or [cut[0].env_steps])[-1]
            found.append(Course(task, arm, run, len(cut), undone, before[0], lowest, last, end))
    return found


def path_table(found: list[Course]) -> str:
    """What the way there cost and where it led, as Markdown; and which arms are no equals."""
    arms: dict[tuple[str, str], list[Course]] = defaultdict(list)
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
    return "\n".join([tabulate(rows, names, "pipe", disable_numparse=True), *_unequal(found)])


def _unequal(found: list[Course]) -> Iterable[str]:
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


def write_csv(measured: list[Measured]) -> str:
    """One line for each episode of each measurement."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("task", "arm", "seed", "run", "env_steps", "moment", "cut", "sparsity")
    names += ("parameters", "macs", "decision_ms")
    writer.writerow([*names, "episode", "episode_return"])
    for m in measured:
        own = [getattr(m, name) for name in names]
        writer.writerows([*own, i, f"{value:.3f}"] for i, value in enumerate(m.returns))
    return text.getvalue()


def picture(measured: list[Measured]) -> bytes:
    """A row for each task: return against env steps, sparsity, and planning MACs, as PNG.

    Error bars and bands span the runs of an arm. A cut that a run undid is a cross.
    """
    tasks = sorted({m.task for m in measured})
    arms = sorted({m.arm for m in measured}, key=lambda arm: (not arm.startswith("dense"), arm))
    colour = {arm: f"C{i % 10}" for i, arm in enumerate(arms)}
    found, curves = points(measured), _curves(measured)
    figures = {"sparsity": "sparsity", "macs": "planning MACs"}
    known = [name for name in figures if any(p.mean_of(name) is not None for p in found)]
    figure = Figure(figsize=(4 + 4 * len(known), 0.6 + 3.4 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), 1 + len(known), squeeze=False)
    for row, task in zip(rows, tasks, strict=True):
        for arm in arms:
            own = [p for p in found if (p.task, p.arm) == (task, arm)]
            _draw_curve(row[0], curves.get((task, arm), {}), colour[arm])
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


def _curves(measured: list[Measured]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(task, arm) → env steps → return of each run, where all runs of the arm were evaluated."""
    curves: dict = defaultdict(lambda: defaultdict(dict))
    runs: dict = defaultdict(set)
    for m in sorted(measured, key=lambda m: (m.task, m.arm, m.due, m.seed)):
        runs[m.task, m.arm].add(m.run)
        if m.moment == "evaluation":
            curves[m.task, m.arm][m.due][m.run] = m.mean
    return {
        arm: {
            due: list(returns.values())
            for due, returns in curve.items()
            if len(returns) == len(runs[arm])
        }
        for arm, curve in curves.items()
    }


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
