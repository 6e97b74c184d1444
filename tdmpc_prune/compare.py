"""Runs beside each other: return against env steps, sparsity and milliseconds per decision.

Everything comes from the runs' folders: `run.json` and `history.jsonl`. Runs that differ in nothing
but their seed are one arm.
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
from tabulate import tabulate

from tdmpc_prune.checkpoint import read_run
from tdmpc_prune.config import by_dotted_name
from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning_report import read_history

_NOT_OF_THE_ARM = {"seed", "run_dir", "resume", "device", "threads", "prune.method", "task"}
_PASSING = ("after", "recovering", "not recovered")  # moments in which a cut is not settled


@dataclass(frozen=True)
class Measured:
    """One measurement of the return in one run."""

    task: str
    arm: str
    seed: int
    run: str  # its folder
    env_steps: int
    moment: str  # "evaluation", or where in a cut: before, after, recovering, (not) recovered
    cut: int  # the cut that left these networks; 0 for the ones that the run started with
    sparsity: float | None  # None in the history of older releases, like the next three
    parameters: int | None
    macs: int | None  # multiply-accumulates of one decision
    decision_ms: float | None
    returns: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and below them.

    Raises:
        UserError: a path holds none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        runs = sorted(file.parent for file in path.glob("**/run.json"))
        if not runs:
            raise UserError(f"'{path}' is not the folder of a run and holds none (no run.json)")
        found |= dict.fromkeys(runs)
    return list(found)


def read(run_dirs: list[Path]) -> tuple[list[Measured], list[Path]]:
    """Every measurement of the runs, and the runs that have none yet."""
    settings = {run_dir: read_run(run_dir) for run_dir in run_dirs}
    arms = _arms(settings)
    measured, without = [], []
    for run_dir in run_dirs:
        own = list(_read_one(run_dir, settings[run_dir], arms[run_dir]))
        measured += own
        if not own:
            without.append(run_dir)
    return measured, without


def _read_one(run_dir: Path, settings: dict[str, Any], arm: str) -> Iterable[Measured]:
    cut, kept = 0, 0
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
                moment=entry.get("moment", "evaluation"),
                cut=cut,
                sparsity=entry.get("sparsity"),
                parameters=entry.get("parameters"),
                macs=entry.get("macs", entry.get("planning_macs")),
                decision_ms=entry.get("decision_ms"),
                returns=tuple(entry["returns"]),
            )


def _arms(settings: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """A name for each run: its pruning method, and what else sets it apart from the others.

    Settings are compared among the runs of one task; a pruning setting, among those of one method.
    """
    flat = {run_dir: by_dotted_name(values) for run_dir, values in settings.items()}
    names = {}
    for run_dir, own in flat.items():
        task, method = own["task"], own["prune.method"]
        peers = [other for other in flat.values() if other["task"] == task]
        alike = [other for other in peers if other["prune.method"] == method]
        parts = ["dense" if method == "none" else method]
        if own.get("start_from"):
            parts.append("of a finished agent")
        for name, value in own.items():
            rivals = alike if name.startswith("prune.") else peers
            skipped = name in _NOT_OF_THE_ARM or name == "start_from"
            if not skipped and any(other.get(name) != value for other in rivals):
                parts.append(f"{name}={value}")
        names[run_dir] = " ".join(parts)
    return names


@dataclass(frozen=True)
class Point:
    """What an arm was after one of its cuts, over its seeds."""

    task: str
    arm: str
    cut: int
    last: dict[int, Measured]  # seed → the last settled measurement with these networks

    def mean_of(self, name: str) -> float | None:
        """Mean over the seeds of a figure; None if a run does not have it."""
        values = [getattr(measured, name) for measured in self.last.values()]
        return None if None in values else float(np.mean(values))

    @property
    def each(self) -> list[float]:
        """Mean return of each seed."""
        return [measured.mean for _, measured in sorted(self.last.items())]


def points(measured: list[Measured]) -> list[Point]:
    """One for each arm and cut, in order."""
    last: dict[tuple[str, str, int], dict[int, Measured]] = defaultdict(dict)
    for m in measured:
        if m.moment not in _PASSING:
            last[m.task, m.arm, m.cut][m.seed] = m
    return [Point(*key, seeds) for key, seeds in sorted(last.items(), key=lambda item: item[0])]


def table(measured: list[Measured]) -> str:
    """What each arm reached after each of its cuts, as Markdown."""
    found = points(measured)
    dense = {p.task: np.mean(p.each) for p in found if p.arm.startswith("dense")}
    rows = []
    for p in found:
        reference = dense.get(p.task)
        rows.append(
            (
                p.task,
                p.arm,
                p.cut,
                len(p.last),
                _shown(p.mean_of("env_steps"), ",.0f"),
                _shown(p.mean_of("sparsity"), ".3f"),
                _shown(p.mean_of("parameters"), ",.0f"),
                _shown(p.mean_of("macs"), ",.0f"),
                _shown(p.mean_of("decision_ms"), ".1f"),
                f"{np.mean(p.each):.0f} ({', '.join(f'{value:.0f}' for value in p.each)})",
                f"{np.mean(p.each) / reference:.0%}" if reference and reference > 0 else "",
            )
        )
    names = ["task", "arm", "cuts", "seeds", "env steps", "sparsity", "parameters"]
    names += ["planning MACs", "ms per decision", "return (each seed)", "of dense"]
    return tabulate(rows, names, "pipe", disable_numparse=True)


def curve_table(measured: list[Measured]) -> str:
    """Every evaluation that all seeds of an arm have in common, as Markdown."""
    rows = [
        (task, arm, f"{env_steps:,}", len(seeds), f"{np.mean(list(seeds.values())):.0f}", each)
        for (task, arm), curve in _curves(measured).items()
        for env_steps, seeds in curve.items()
        for each in [", ".join(f"{value:.0f}" for value in seeds.values())]
    ]
    names = ["task", "arm", "env steps", "seeds", "return", "each seed"]
    return tabulate(rows, names, "pipe", disable_numparse=True)


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
    """A row for each task: return against env steps, sparsity, and ms per decision, as PNG.

    Error bars and bands span the seeds.
    """
    tasks = sorted({m.task for m in measured})
    arms = sorted({m.arm for m in measured}, key=lambda arm: (not arm.startswith("dense"), arm))
    colour = {arm: f"C{i % 10}" for i, arm in enumerate(arms)}
    found, curves = points(measured), _curves(measured)
    figures = {"sparsity": "sparsity", "decision_ms": "ms per decision"}
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
        if "decision_ms" in known and high > 5 * max(low, 1e-9):
            row[-1].set_xscale("log")
    lines = [figure.axes[0].plot([], [], "o-", color=colour[arm], label=arm)[0] for arm in arms]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _curves(measured: list[Measured]) -> dict[tuple[str, str], dict[int, dict[int, float]]]:
    """(task, arm) → env steps → seed → return, where all seeds of the arm were evaluated."""
    curves: dict = defaultdict(lambda: defaultdict(dict))
    for m in sorted(measured, key=lambda m: (m.task, m.arm, m.env_steps, m.seed)):
        if m.moment == "evaluation":
            curves[m.task, m.arm][m.env_steps][m.seed] = m.mean
    for curve in curves.values():
        seeds = max(len(values) for values in curve.values())
        for env_steps in [steps for steps, values in curve.items() if len(values) < seeds]:
            del curve[env_steps]
    return curves


def _draw_curve(axis: Axes, curve: dict[int, dict[int, float]], colour: str) -> None:
    values = [list(seeds.values()) for seeds in curve.values()]
    if values:
        axis.plot(list(curve), [np.mean(v) for v in values], "o-", color=colour, markersize=3)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axis.fill_between(list(curve), low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_points(axis: Axes, own: list[Point], name: str, colour: str) -> None:
    known = [(p.mean_of(name), p.each) for p in own if p.mean_of(name) is not None]
    placed = sorted(known, key=lambda pair: pair[0])
    if placed:
        mean = np.array([np.mean(each) for _, each in placed])
        low = mean - [min(each) for _, each in placed]
        high = [max(each) for _, each in placed] - mean
        axis.errorbar(
            [x for x, _ in placed], mean, [low, high], fmt="o-", color=colour, markersize=4
        )


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
