"""Runs beside each other: their measurements, and what an arm was after each of its cuts.

Everything comes from the runs' folders: `run.json` and `history.jsonl`. Runs that differ in nothing
but their seed, and what follows from it, are one arm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdmpc_prune.errors import UserError
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.settings import by_dotted_name, from_plain, to_plain
from tdmpc_prune.training.config import TrainConfig

_NOT_OF_THE_ARM = {
    *("seed", "run_dir", "resume", "device", "threads", "prune.method", "prune.plan", "task"),
    "start_from",
}
# Moments in which a cut is not settled.
_PASSING = ("after", "mended", "not mended", "recovering", "not recovered")


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
        runs = [run for run in runs if "task" in RunFolder(run).settings()]
        if not runs:
            raise UserError(f"'{path}' is not the folder of an agent's run and holds none")
        found |= dict.fromkeys(runs)
    return list(found)


def read(run_dirs: list[Path]) -> tuple[list[Measured], list[Path]]:
    """Every measurement of the runs, and the runs that have none yet."""
    settings = {run_dir: to_plain(settings_of(run_dir)) for run_dir in run_dirs}
    arms = _arms(settings)
    measured, without = [], []
    for run_dir in run_dirs:
        own = list(_read_one(run_dir, settings[run_dir], arms[run_dir]))
        measured += own
        if not own:
            without.append(run_dir)
    return measured, without


def left_out(without: list[Path]) -> list[str]:
    """A line for each run that is not shown."""
    return [f"left out: '{run}' has not been evaluated yet" for run in without]


def settings_of(run_dir: Path) -> TrainConfig:
    """A run's settings; those that older releases did not have are filled in."""
    return from_plain(TrainConfig, RunFolder(run_dir).settings())


def _read_one(run_dir: Path, settings: dict[str, Any], arm: str) -> Iterable[Measured]:
    cut, kept, every = 0, 0, settings["eval_every"]
    timed = {
        name: agent["decision_ms"]["median"]
        for entry in RunFolder(run_dir).read_history("times")
        for name, agent in entry["agents"].items()
    }
    for entry in RunFolder(run_dir).read_history("evaluation", "tracking", "cut", "undone"):
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


def curves(measured: list[Measured]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(task, arm) → env steps → return of each run, where all runs of the arm were evaluated."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    runs: dict = defaultdict(set)
    for m in sorted(measured, key=lambda m: (m.task, m.arm, m.due, m.seed)):
        runs[m.task, m.arm].add(m.run)
        if m.moment == "evaluation":
            found[m.task, m.arm][m.due][m.run] = m.mean
    return {
        arm: {
            due: list(returns.values())
            for due, returns in curve.items()
            if len(returns) == len(runs[arm])
        }
        for arm, curve in found.items()
    }


def dense_curves(measured: list[Measured]) -> dict[str, dict[float, float]]:
    """Task → env steps → mean return of its dense runs, where all of them were evaluated.

    With several dense arms there is no saying which is the reference.
    """
    every = curves(measured)
    found = {}
    for task in {m.task for m in measured}:
        dense = [arm for own, arm in every if own == task and arm.startswith("dense")]
        if len(dense) == 1:
            evaluated: dict[int, list[int]] = defaultdict(list)
            for m in measured:
                if (m.task, m.arm, m.moment) == (task, dense[0], "evaluation"):
                    evaluated[m.due].append(m.env_steps)
            found[task] = {
                float(np.mean(evaluated[due])): float(np.mean(each))
                for due, each in every[task, dense[0]].items()
            }
    return found


@dataclass(frozen=True)
class PruningPath:
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


def paths(measured: list[Measured]) -> list[PruningPath]:
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
            found.append(
                PruningPath(task, arm, run, len(cut), undone, before[0], lowest, last, end)
            )
    return found
