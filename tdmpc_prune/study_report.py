"""What a study found: tables and pictures, from its CSV of results alone.

Statistics after Agarwal et al. 2021 (Deep RL at the edge of the statistical precipice): the
interquartile mean with stratified bootstrap intervals, performance profiles, and the probability of
improvement. Scores are fractions of the dense agent's return before the cut (ours).
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.stats import trim_mean
from tabulate import tabulate

from tdmpc_prune.config import ARMS, DENSE, SMALL
from tdmpc_prune.errors import UserError
from tdmpc_prune.files import png

_RESAMPLES = 2000


@dataclass(frozen=True)
class Result:
    """One line of the CSV: one arm on one task at one sparsity with one seed."""

    task: str
    arm: str
    asked: float | None  # sparsity
    seed: int
    sparsity: float
    parameters: int
    macs: int
    decision_ms: float
    before: float  # return of the dense agent at the cut
    after: float | None  # right after the cut
    recovery: int | None  # env steps until 95 % of `before` are back; None: not within the budget
    end: float  # return at the end of the budget
    env_steps: int
    seconds: float


_READINGS: dict[str, Callable[[Result], float]] = {  # of a cut; more is better
    "right after": lambda r: r.after / r.before,
    "recovery": lambda r: -math.inf if r.recovery is None else -r.recovery,
    "end": lambda r: r.end / r.before,
}
_COMPARED = (  # reading, and the arm to improve on
    ("right after", None),
    ("right after", "magnitude"),
    ("recovery", None),
    ("recovery", "magnitude"),
    ("end", None),
    ("end", "magnitude"),
    ("end", SMALL),
)


def of_job(result: dict[str, Any]) -> Result:
    """The line of a job's `result.json`."""
    job = result["job"]
    return Result(
        task=job["task"],
        arm=job["arm"],
        asked=job["sparsity"],
        seed=job["seed"],
        sparsity=result["sparsity"],
        parameters=result["parameters"],
        macs=result["macs"],
        decision_ms=result["decision_ms"],
        before=result["before"],
        after=float(np.mean(result["after"])) if result["after"] else None,
        recovery=result["recovery"],
        end=float(np.mean(result["returns"])),
        env_steps=result["env_steps"],
        seconds=result["seconds"],
    )


def as_csv(results: list[Result]) -> str:
    text = io.StringIO()
    names = [field.name for field in fields(Result)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for result in results:
        values = [getattr(result, name) for name in names]
        writer.writerow("" if value is None else value for value in values)
    return text.getvalue()


def of_csv(path: Path) -> list[Result]:
    """The results that `as_csv` wrote. Raises UserError: it is no such file."""
    kinds: dict[str, Callable[[str], Any]] = {"task": str, "arm": str}
    kinds |= dict.fromkeys(("seed", "parameters", "macs", "env_steps", "recovery"), int)
    try:
        with path.open(newline="") as file:
            return [
                Result(
                    **{
                        field.name: kinds.get(field.name, float)(row[field.name])
                        if row[field.name] != ""
                        else None
                        for field in fields(Result)
                    }
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' is no table of a study: {error!r}") from error


# --- Statistics ------------------------------------------------------------------------------


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half, `[..., N]` → `[...]`."""
    return trim_mean(values, 0.25, axis=-1)


def interval(
    strata: list[np.ndarray], statistic: Callable[[list[np.ndarray]], np.ndarray]
) -> tuple[float, float, float]:
    """A statistic, and its 95 % bootstrap percentile interval; each stratum is resampled alone.

    Args:
        strata: samples, `[n]` each.
        statistic: `[R, n]` of each stratum → `[R]`.
    """
    rng = np.random.default_rng(0)
    drawn = [s[rng.integers(len(s), size=(_RESAMPLES, len(s)))] for s in strata]
    low, high = np.percentile(statistic(drawn), [2.5, 97.5])
    return statistic([s[None] for s in strata]).item(), float(low), float(high)


def iqm_interval(strata: list[np.ndarray]) -> tuple[float, float, float]:
    """Interquartile mean of all strata together, and its interval."""
    return interval(strata, lambda samples: interquartile_mean(np.concatenate(samples, axis=-1)))


def improvement_interval(
    one: list[np.ndarray], other: list[np.ndarray]
) -> tuple[float, float, float]:
    """Probability that a run of one arm is better than one of the other, and its interval.

    The mean over the strata; equal ones count half.
    """
    count = len(one)

    def probability(samples: list[np.ndarray]) -> np.ndarray:
        pairs = [
            (a[..., :, None], b[..., None, :])
            for a, b in zip(samples[:count], samples[count:], strict=True)
        ]
        return np.mean([((a > b) + (a == b) / 2).mean((-1, -2)) for a, b in pairs], axis=0)

    return interval([*one, *other], probability)


# --- Tables ----------------------------------------------------------------------------------


def tables(results: list[Result]) -> str:
    """Of each task: every cell (sparsity, arm), and the arms over all sparsities; as Markdown.

    With several tasks also the arms over all of them.
    """
    parts = []
    tasks = list(dict.fromkeys(r.task for r in results))
    for task in tasks:
        own = [r for r in results if r.task == task]
        parts += [f"**{task}**", _cells(own), f"**{task}, all sparsities**", _overall(own)]
    if len(tasks) > 1:
        parts += ["**All tasks, the arms that have every cell**", _overall(results)]
    return "\n\n".join(parts) + "\n"


def _cells(results: list[Result]) -> str:
    rows = []
    for asked, arm in _order(results):
        own = [r for r in results if (r.asked, r.arm) == (asked, arm)]
        after = [r.after for r in own if r.after is not None]
        rows.append(
            (
                "" if asked is None else f"{asked:g}",
                arm,
                len(own),
                f"{np.mean([r.parameters for r in own]):,.0f}",
                f"{np.mean([r.macs for r in own]) / 1e6:.1f}",
                f"{np.median([r.decision_ms for r in own]):.1f}",
                _shown(iqm_interval([np.array(after)]), ".0f") if after else "",
                _recovered(own),
                _shown(iqm_interval([np.array([r.end for r in own])]), ".0f"),
            )
        )
    names = ["sparsity", "arm", "seeds", "parameters", "million MACs", "ms per decision"]
    names += ["return right after", "back at 95 %, median env steps", "return at the end"]
    return tabulate(rows, names, "pipe", disable_numparse=True)


def _recovered(results: list[Result]) -> str:
    steps = [r.recovery for r in results if r.recovery is not None]
    median = f", {np.median(steps):,.0f}" if steps else ""
    return f"{len(steps)} of {len(results)}{median}"


def _order(results: list[Result]) -> list[tuple[float | None, str]]:
    known = {(r.asked, r.arm) for r in results}
    return sorted(known, key=lambda cell: (cell[0] or 0.0, ARMS.index(cell[1])))


def _strata(results: list[Result]) -> dict[str, list[list[Result]]]:
    """Arm → its runs by cell (task, sparsity), of the pruned arms that have every cell."""
    cells: dict[tuple, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        if r.asked is not None:
            cells[r.task, r.asked][r.arm].append(r)
    return {
        arm: [cells[cell][arm] for cell in sorted(cells)]
        for arm in ARMS
        if cells and all(arm in own for own in cells.values())
    }


def _overall(results: list[Result]) -> str:
    strata = _strata(results)
    read = {
        (reading, arm): [np.array([value(r) for r in cell]) for cell in own]
        for reading, value in _READINGS.items()
        for arm, own in strata.items()
        if reading == "end" or arm != SMALL  # which has nothing to recover from
    }
    rows = []
    for arm, own in strata.items():
        runs = [r for cell in own for r in cell]
        row = [arm, len(runs)]
        for reading, reference in _COMPARED:
            mine, theirs = read.get((reading, arm)), read.get((reading, reference))
            if reference is None and reading == "recovery":
                row.append(_recovered(runs))
            elif reference is None:
                row.append(_shown(iqm_interval(mine), ".2f") if mine else "")
            else:
                known = mine and theirs and arm != reference
                row.append(_shown(improvement_interval(mine, theirs), ".2f") if known else "")
        rows.append(row)
    names = ["arm", "runs", "right after, of the dense return", "P(more than magnitude)"]
    names += ["back at 95 %, median env steps", "P(sooner than magnitude)"]
    names += ["at the end, of the dense return", "P(more than magnitude)"]
    names += [f"P(more than {SMALL})"]
    return tabulate(rows, names, "pipe", disable_numparse=True)


def _shown(values: tuple[float, float, float], form: str) -> str:
    middle, low, high = (format(value, form) for value in values)
    return f"{middle} [{low}, {high}]"


# --- Pictures --------------------------------------------------------------------------------


def pictures(results: list[Result]) -> dict[str, bytes]:
    """Name → PNG."""
    return {
        "sparsity": png(_against_sparsity(results)),
        "profile": png(_profiles(results)),
        "cost": png(_against_cost(results)),
    }


def _colours(results: list[Result]) -> dict[str, str]:
    arms = [arm for arm in ARMS if any(r.arm == arm for r in results)]
    return {arm: "black" if arm == DENSE else f"C{i % 10}" for i, arm in enumerate(arms)}


def _against_sparsity(results: list[Result]) -> Figure:
    """The three readings against sparsity, a row for each task: interquartile means, and runs."""
    tasks = list(dict.fromkeys(r.task for r in results))
    readings = {
        "return right after the cut": lambda r: r.after,
        "share of runs back at 95 %": lambda r: float(r.recovery is not None),
        "return at the end of the budget": lambda r: r.end,
    }
    figure = Figure(figsize=(14, 1 + 3.6 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), len(readings), squeeze=False)
    colours = _colours(results)
    for row, task in zip(rows, tasks, strict=True):
        asked = sorted({r.asked for r in results if r.task == task and r.asked is not None})
        for axis, (name, read) in zip(row, readings.items(), strict=True):
            for i, (arm, colour) in enumerate(colours.items()):
                points = defaultdict(list)
                for r in results:
                    if (r.task, r.arm) == (task, arm) and read(r) is not None:
                        points[r.asked].append(read(r))
                shift = 0.6 * (i / len(colours) - 0.5)  # else equal ones hide each other
                places = {sparsity: place + shift for place, sparsity in enumerate(asked)}
                _draw_readings(axis, points, places, arm, colour)
            axis.set_xticks(range(len(asked)), [f"{sparsity:g}" for sparsity in asked])
            axis.set_title(f"{task}: {name}", fontsize=9)
            axis.set_xlabel("sparsity")
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            axis.grid(alpha=0.3)
    handles, labels = rows[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _draw_readings(axis, points: dict, places: dict, arm: str, colour: str) -> None:
    """One arm: sparsity → values, and sparsity → x."""
    if arm == DENSE:
        if points:
            level = interquartile_mean(np.array(points[None]))
            axis.axhline(level, color=colour, linestyle=":", label=arm)
        return
    x = [places[sparsity] for sparsity in sorted(points)]
    values = [np.array(points[sparsity]) for sparsity in sorted(points)]
    axis.plot(x, [interquartile_mean(v) for v in values], "o-", color=colour, ms=5, label=arm)
    for at, own_values in zip(x, values, strict=True):
        axis.plot([at] * len(own_values), own_values, ".", color=colour, alpha=0.4, ms=4)


def _profiles(results: list[Result]) -> Figure:
    """Share of runs that keep more than tau of the dense return, over all sparsities of a task."""
    tasks = list(dict.fromkeys(r.task for r in results))
    readings = {"right after": "right after the cut", "end": "at the end of the budget"}
    figure = Figure(figsize=(11, 1 + 3.4 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), len(readings), squeeze=False, sharex=True, sharey=True)
    colours, taus = _colours(results), np.linspace(0, 1.2, 121)
    for row, task in zip(rows, tasks, strict=True):
        strata = _strata([r for r in results if r.task == task])
        for axis, (reading, name) in zip(row, readings.items(), strict=True):
            for arm, cells in strata.items():
                runs = [
                    r for cell in cells for r in cell if r.after is not None or reading == "end"
                ]
                kept = np.array([_READINGS[reading](r) for r in runs])
                if len(kept):
                    shares = [(kept > tau).mean() for tau in taus]
                    axis.plot(taus, shares, color=colours[arm], label=arm)
            axis.set_title(f"{task}: {name}", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("share of runs above tau")
    for axis in rows[-1]:
        axis.set_xlabel("tau, fraction of the dense return")
    handles, labels = rows[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure


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
        row[0].set_ylabel(f"{task}: return at the end")
    handles, labels = rows[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure
