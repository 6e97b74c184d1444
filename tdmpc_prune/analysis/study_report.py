"""What a study found: its tables, from its CSV of results alone.

Statistics after Agarwal et al. 2021 (Deep RL at the edge of the statistical precipice): the
interquartile mean with stratified bootstrap intervals, performance profiles, and the probability of
improvement. Scores are fractions of the dense agent's return before the cut (ours).
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from tdmpc_prune.analysis.arms import ARMS, RECIPES, REINITIALISED, SMALL, STUDENT
from tdmpc_prune.errors import UserError
from tdmpc_prune.words import csv_text, table

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
    end: float  # return at the end of the budget: the better of `trained` and what it was before
    env_steps: int
    seconds: float
    # What older studies did not keep:
    budget: int | None = None  # env steps of training after the cut
    cut_seconds: float | None = None  # CPU time of ranking, cut, refit and offline steps
    updates: int | None = None  # of the training after it; of a small one from scratch: all
    training_macs: int | None = None  # of these updates
    commit: str | None = None
    trained: float | None = None  # after all training; in older studies that was the end


READINGS: dict[str, Callable[[Result], float]] = {  # of a cut; more is better
    "right after": lambda r: _share(r.after, r),
    "recovery": lambda r: -math.inf if r.recovery is None else -r.recovery,
    "end": lambda r: _share(r.end, r),
}
_BETTER = {
    "right after": "more right after the cut",
    "recovery": "sooner back",
    "end": "more at the end",
}
_REFERENCES = (  # the arms to improve on
    *("magnitude", "random", "compensated plain"),
    *(REINITIALISED, SMALL, STUDENT),
)
FEWEST = 3  # runs of a stratum that are given an interval
_NAMED = 3  # arms that a heading lists; more are counted


def _share(value: float, of: Result) -> float:
    """A return as a fraction of the dense agent's; 1 is as good also where returns are negative."""
    if of.before == 0:
        raise UserError(
            f"the dense agent of {of.task}, seed {of.seed} returns 0: nothing to compare"
        )
    return 1 + (value - of.before) / abs(of.before)


def of_job(result: dict[str, Any], decision_ms: float) -> Result:
    """The line of a job's `result.json`, and of the time that its agent takes to decide."""
    job = result["job"]
    return Result(
        task=job["task"],
        arm=job["arm"],
        asked=job["sparsity"],
        seed=job["seed"],
        sparsity=result["sparsity"],
        parameters=result["parameters"],
        macs=result["macs"],
        decision_ms=round(decision_ms, 3),
        before=result["before"],
        after=float(np.mean(result["after"])) if result["after"] else None,
        # What begins from scratch has nothing to come back to.
        recovery=None if job["arm"] == SMALL else result["recovery"],
        end=float(np.mean(result["returns"])),
        env_steps=result["env_steps"],
        seconds=result["seconds"],
        budget=result["budget"],
        cut_seconds=result["cut_seconds"],
        updates=result["updates"],
        training_macs=result["training_macs"],
        commit=result["commit"],
        trained=float(np.mean(result["trained"])) if result.get("trained") else None,
    )


def as_csv(results: list[Result]) -> str:
    return csv_text(map(astuple, results), [field.name for field in fields(Result)])


def of_csv(path: Path) -> list[Result]:
    """The results that `as_csv` wrote. Raises UserError: it is no such file, or has no runs."""
    kinds: dict[str, Callable[[str], Any]] = {"task": str, "arm": str, "commit": str}
    whole = ("seed", "parameters", "macs", "env_steps", "recovery")
    kinds |= dict.fromkeys((*whole, "budget", "updates", "training_macs"), int)
    newer = ("budget", "cut_seconds", "updates", "training_macs", "commit", "trained")
    may_lack = ("asked", "after", "recovery", *newer)

    def value(name: str, row: dict[str, str]) -> Any:
        text = row.get(name, "") if name in newer else row[name]
        return None if text == "" and name in may_lack else kinds.get(name, float)(text)

    try:
        with path.open(newline="") as file:
            names = [field.name for field in fields(Result)]
            rows = csv.DictReader(file)
            results = [Result(**{name: value(name, row) for name in names}) for row in rows]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' is no table of a study: {error!r}") from error
    runs = [(r.task, r.arm, r.asked, r.seed) for r in results]
    if not results:
        raise UserError(f"'{path}' has no runs in it")
    if unknown := {r.arm for r in results} - set(ARMS):
        raise UserError(f"'{path}': there is no arm '{min(unknown)}'")
    if len(set(runs)) < len(runs):
        twice = next(run for run in runs if runs.count(run) > 1)
        raise UserError(f"'{path}' has the run {twice} twice")
    return results


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
    """All that was found, as Markdown.

    The answer first: the arms that the question is about, on every task at every sparsity. Then of
    each task every cell (sparsity, arm), and the arms over all sparsities that each of them was run
    at; with several tasks also the arms over all of these.
    """
    parts = []
    if shown(results):
        title = f"**{ending(results).capitalize()}, as a fraction of the dense return**"
        parts = [title, _answer(results)]
    tasks = list(dict.fromkeys(r.task for r in results))
    for task in tasks:
        own = [r for r in results if r.task == task]
        parts += [f"**{task}, each sparsity**", _cells(own), *_overall(task, own)]
    if len(tasks) > 1:
        parts += _overall("All tasks", results)
    return "\n\n".join(parts) + "\n"


def no_budget(results: list[Result]) -> bool:
    """Whether nothing was trained after the cut: then the end is right after it."""
    return all(r.budget == 0 for r in results)


def ending(results: list[Result]) -> str:
    """What the reading at the end is of."""
    return "return right after the cut" if no_budget(results) else "return at the end of the budget"


def shown(results: list[Result]) -> list[str]:
    """The arms that the question is about, the dense one left out: five at most."""
    there = {r.arm for r in results}
    recipe = next((arm for arm in RECIPES if arm in there), "")
    wanted = (recipe, STUDENT, SMALL, "compensated plain", "bayesian refitted", "bayesian")
    return [arm for arm in wanted if arm in there][:5]


def _answer(results: list[Result]) -> str:
    arms, rows = shown(results), []
    cells = sorted({(r.task, r.asked) for r in results if r.arm in arms})
    for task, asked in cells:
        own = [r for r in results if (r.task, r.asked) == (task, asked)]
        row = [task, f"{asked:g}"]
        for arm in arms:
            ends = np.array([READINGS["end"](r) for r in own if r.arm == arm])
            row.append(f"{_iqm([ends], '.2f')} ({len(ends)})" if len(ends) else "")
        rows.append(row)
    return table(rows, ["task", "sparsity", *(f"{arm} (seeds)" for arm in arms)])


def _cells(results: list[Result]) -> str:
    at_once, rows = no_budget(results), []
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
                *([] if at_once else [_iqm([np.array(after)], ".0f") if after else ""]),
                *([] if at_once else [_recovered(own)]),
                _iqm([np.array([r.end for r in own])], ".0f"),
            )
        )
    names = ["sparsity", "arm", "seeds", "parameters", "million MACs", "ms per decision"]
    names += [] if at_once else ["return right after", "back at 95 %, median env steps"]
    return table(rows, [*names, ending(results) if at_once else "return at the end"])


def _order(results: list[Result]) -> list[tuple[float | None, str]]:
    known = {(r.asked, r.arm) for r in results}
    return sorted(known, key=lambda cell: (cell[0] or 0.0, ARMS.index(cell[1])))


def _recovered(results: list[Result]) -> str:
    """How many, and the median of all: those that did not come back took longer than any."""
    if results[0].arm == SMALL:
        return ""
    count = sum(r.recovery is not None for r in results)
    median = np.median([math.inf if r.recovery is None else r.recovery for r in results])
    return f"{count} of {len(results)}" + (f", {median:,.0f}" if np.isfinite(median) else "")


def strata_of(results: list[Result]) -> tuple[dict[str, list[list[Result]]], str]:
    """Arm → its runs by cell (task, sparsity), and what was left out.

    The pruned arms that every task has, and the cells that all of these have.
    """
    cells: dict[tuple, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    arms_of: dict[str, set[str]] = defaultdict(set)
    for r in results:
        if r.asked is not None:
            cells[r.task, r.asked][r.arm].append(r)
            arms_of[r.task].add(r.arm)
    arms = [arm for arm in ARMS if arms_of and all(arm in own for own in arms_of.values())]
    whole = [cell for cell in sorted(cells) if all(arm in cells[cell] for arm in arms)]
    without = [
        f"{task} at {sparsity:g}"
        for task, sparsity in sorted(cells)
        if (task, sparsity) not in whole
    ]
    rare = [arm for arm in ARMS if arm not in arms and any(arm in own for own in arms_of.values())]
    without += rare if len(rare) <= _NAMED else [f"{len(rare)} arms"]
    left_out = f"; without {', '.join(without)}, for lack of runs" if without else ""
    return {arm: [cells[cell][arm] for cell in whole] for arm in arms if whole}, left_out


def _overall(title: str, results: list[Result]) -> list[str]:
    """What is left, and what improves on what; with titles."""
    strata, left_out = strata_of(results)
    if not strata:
        return []
    at_once = no_budget(results)
    asked = sorted({r.asked for own in strata.values() for cell in own for r in cell})
    title = f"{title}, at {' and '.join(f'{sparsity:g}' for sparsity in asked)}"
    read = {
        (reading, arm): [np.array([value(r) for r in cell]) for cell in own]
        for reading, value in READINGS.items()
        for arm, own in strata.items()
        if reading == "end" or not (arm == SMALL or at_once)
    }
    rows = []
    for arm, own in strata.items():
        runs = [r for cell in own for r in cell]
        end = _iqm(read["end", arm], ".2f")
        if at_once:
            rows.append((arm, len(runs), end))
            continue
        after = _iqm(read["right after", arm], ".2f") if arm != SMALL else ""
        rows.append((arm, len(runs), after, _recovered(runs), end))
    names = ["right after", "back at 95 %, median env steps", "at the end"]
    names = ["arm", "runs", *(names[:1] if at_once else names)]
    parts = [
        f"**{title}: fraction of the dense return{left_out}**",
        table(rows, names),
    ]
    for reading, better in _BETTER.items():
        better = _BETTER["right after"] if at_once else better
        references = [arm for arm in _REFERENCES if (reading, arm) in read]
        rows = [
            [arm, *(_improvement(read, reading, arm, other) for other in references)]
            for arm in strata
            if (reading, arm) in read
        ]
        if references:
            parts.append(f"**{title}: probability of being {better} than …**")
            parts.append(table(rows, ["arm", *references]))
    return [*parts, *_costs(title, strata)]


def _costs(title: str, strata: dict[str, list[list[Result]]]) -> list[str]:
    """What an arm costs beside the dense agent; of older studies nothing."""
    rows = []
    for arm, own in strata.items():
        runs = [r for cell in own for r in cell if r.training_macs is not None]
        cuts = [r.cut_seconds for r in runs if r.cut_seconds is not None]
        if runs:
            updates = np.median([r.updates for r in runs])
            macs = np.median([r.training_macs for r in runs]) / 1e12
            seconds = f"{np.median(cuts):.1f}" if cuts else ""
            rows.append((arm, seconds, f"{updates:,.0f}", f"{macs:.3g}"))
    names = ["arm", "CPU seconds of the cut", "updates after it", "10^12 MACs of the updates"]
    return [f"**{title}: costs, medians**", table(rows, names)] if rows else []


def _improvement(read: dict, reading: str, arm: str, other: str) -> str:
    if arm == other:
        return ""
    one, two = read[reading, arm], read[reading, other]
    return _shown(improvement_interval(one, two), ".2f", one, two)


def _iqm(strata: list[np.ndarray], form: str) -> str:
    return _shown(iqm_interval(strata), form, strata)


def _shown(values: tuple[float, float, float], form: str, *of_arms: list[np.ndarray]) -> str:
    """A statistic of these arms' runs, with its interval if each stratum has enough of them."""
    middle, low, high = (format(value, form) for value in values)
    enough = min(len(stratum) for strata in of_arms for stratum in strata) >= FEWEST
    return f"{middle} [{low}, {high}]" if enough else middle
