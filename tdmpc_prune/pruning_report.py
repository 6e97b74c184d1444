"""What pruning did to a run, in pictures and words, from its `history.jsonl` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tdmpc_prune import importance_history
from tdmpc_prune.checkpoint import read_run
from tdmpc_prune.files import png, write_file
from tdmpc_prune.pruning.course import Course
from tdmpc_prune.run_log import read_history
from tdmpc_prune.words import counted


def save(run_dir: Path, course: Course) -> list[Path]:
    """Draw `course.png` and `importance.png` into the run's folder."""
    figures = {"course": draw_course(run_dir, course.unit, course.score)}
    if read_history(run_dir, "importance"):
        figures["importance"] = importance_history.draw(importance_history.read(run_dir))
    for name, figure in figures.items():
        write_file(run_dir / f"{name}.png", png(figure), "run_dir")
    return [run_dir / f"{name}.png" for name in figures]


def announcement(course: Course, now: int) -> str:
    """When the cuts come that lie ahead."""
    schedule = course.schedule
    times = [schedule.time_of(step) for step in range(course.stage.step + 1, schedule.steps + 1)]
    if not times:
        return "no cut is left"
    # What lies behind is due at once.
    shown = list(dict.fromkeys("now" if time <= now else f"{time:,.0f}" for time in times))
    at = ", ".join([*shown[:3], "…", shown[-1]] if len(shown) > 5 else shown)
    where = "now" if shown == ["now"] else f"at {at} {_words(course.unit)}"
    return f"{counted(len(times), 'cut')} to sparsity {schedule.sparsity:g} {where}"


def cut_sentence(step: int, now: int, target: float, size: dict[str, float], course: Course) -> str:
    """A cut that was just made, in words."""
    return (
        f"cut {step} of {course.schedule.steps} at {now:,} {_words(course.unit)}: sparsity "
        f"{size['sparsity']:.3f} ({target:.3f} was asked for), {size['parameters']:,} of "
        f"{sum(course.dense.values()):,} parameters are left"
    )


def sentence(record: dict[str, Any], course: Course) -> str:
    """A finished pruning step in words."""
    recovery, unit = record["recovery"], _words(course.unit)
    took = "not back at 95 %" if recovery is None else f"95 % back after {recovery} {unit}"
    outcome = "kept" if record["kept"] else f"UNDONE: below {record['least']:.4g}"
    step, steps = record["step"], course.schedule.steps
    which = f"of {steps}" if step <= steps else "(smaller, in place of one undone)"
    return (
        f"cut {step} {which} at {record['cut_at']:,} {unit}: sparsity "
        f"{record['sparsity']:.3f} ({record['parameters']:,} parameters), {course.score} "
        f"{record['before']['mean']:.4g} before, {record['after']['mean']:.4g} right after, "
        f"{record['recovered']['mean']:.4g} recovered ({took}); {outcome}"
    )


def reached(course: Course, now: int) -> str:
    """What is left at the end of a run, beside what was asked for."""
    found, dense = course.outcome(now), sum(course.dense.values())
    asked, shortfall = found["asked_sparsity"], found["shortfall"]
    return (
        f"{found['parameters']:,} of {dense:,} parameters are left (sparsity "
        f"{found['sparsity']:.3f}; {asked:g} was asked for), and {found['macs']:,} MACs per "
        f"{'decision' if course.score == 'return' else 'reconstruction'}"
        + (f"\nless than asked for: {shortfall}" if shortfall else "")
    )


def doubt(course: Course) -> str | None:
    """Why the dense networks may be a poor reference, at the first cut; None if they are none."""
    scores, unit = course.stage.dense_scores, _words(course.unit)
    shown = ", ".join(f"{score:.4g} at {time:.0f}" for time, score in scores[-4:])
    if course.levelled_off is False:
        return (
            f"the {course.score} was still rising at the first cut ({shown} {unit}): the dense "
            f"networks had not learnt out; train longer before it (prune.start, {course.unit})"
        )
    if course.levelled_off is None and not course.stage.gathered:
        return (
            f"there was only one evaluation before the first cut ({shown} {unit}): whether the "
            f"{course.score} was still rising is not known; lower eval_every"
        )
    return None


def _words(unit: str) -> str:
    return unit.replace("_", " ")


def draw_course(run_dir: Path, unit: str, score: str) -> Figure:
    """Score, sparsity and MACs against time, each cut marked."""
    settings = read_run(run_dir)
    evaluations = read_history(run_dir, "evaluation", "tracking")
    tracked = read_history(run_dir, "tracking")
    cuts, steps = read_history(run_dir, "cut"), read_history(run_dir, "pruning step")
    undone = {step["step"] for step in steps if not step["kept"]}

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    points = [
        (e[unit], e.get("mean_return", e.get("mean")), e.get("std_return", e.get("std")))
        for e in evaluations
    ]
    x, mean, std = np.array(points or [(0, np.nan, 0)], float).T
    top.errorbar(x, mean, std, color="C0", marker="o", markersize=3, linewidth=1, elinewidth=0.5)
    after = [t for t in tracked if t["moment"] == "after"]
    top.plot(
        [t[unit] for t in after],
        [t["mean"] for t in after],
        "v",
        color="C3",
        label="right after a cut",
    )
    if tracked:
        dense = tracked[0]["mean"]
        top.axhline(dense, color="0.5", linewidth=0.8, linestyle=":", label="before the first cut")
    top.set_ylabel(f"evaluation {score}")
    top.set_ylim(bottom=min(0, top.get_ylim()[0]))
    top.set_title(
        f"{settings.get('task', 'autoencoder')}, {settings['prune']['method']}, "
        f"seed {settings['seed']}",
        fontsize=10,
    )

    sizes = [(0, 0.0, None)] if not settings.get("start_from") else []
    sizes += [
        (t[unit], t["sparsity"], t.get("macs")) for t in read_history(run_dir, "tracking", "undone")
    ]
    sizes += [(evaluations[-1][unit], *sizes[-1][1:])] if sizes and evaluations else []
    middle.step([s[0] for s in sizes], [s[1] for s in sizes], where="post", color="C1")
    middle.set_ylabel("sparsity")
    middle.set_ylim(0, 1)
    costs = [(s[0], s[2]) for s in sizes if s[2] is not None]
    bottom.step([c[0] for c in costs], [c[1] for c in costs], where="post", color="C2")
    bottom.set_ylabel("planning MACs" if score == "return" else "MACs")
    bottom.set_ylim(bottom=0)
    bottom.yaxis.set_major_formatter(EngFormatter())
    bottom.set_xlabel(_words(unit))
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
        for cut in cuts:
            colour = "C3" if cut["step"] in undone else "0.6"
            axis.axvline(cut[unit], color=colour, linewidth=0.8, linestyle="--")
    for cut in cuts:
        label = f"{cut['step']}{' undone' if cut['step'] in undone else ''}"
        top.annotate(
            label,
            (cut[unit], 0),
            xytext=(2, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=7,
        )
    if tracked:
        figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure
