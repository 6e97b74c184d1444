"""What a run tells of its cuts and its agents: sentences, tables, and pictures of its history."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate
from torch import Tensor

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.controller import CPU_MS, decision_milliseconds, median_and_p95
from tdmpc_prune.pruning.pruner import Pruner
from tdmpc_prune.saving.files import png, write_file
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.training import importance_history
from tdmpc_prune.words import counted

if TYPE_CHECKING:  # drawing is slow to import, and comes at the end of a run
    from matplotlib.figure import Figure

_REPEATS = 20  # timed decisions of each agent


def save(folder: RunFolder, pruner: Pruner) -> list[Path]:
    """Draw `course.png` and `importance.png` into the run's folder."""
    figures = {"course": draw_course(folder, pruner.facts.unit, pruner.facts.score)}
    if folder.read_history("importance"):
        figures["importance"] = importance_history.draw(importance_history.read(folder.path))
    for name, figure in figures.items():
        write_file(folder.path / f"{name}.png", png(figure), "run_dir")
    return [folder.path / f"{name}.png" for name in figures]


def announcement(pruner: Pruner, now: int) -> str:
    """When the cuts come that lie ahead."""
    schedule = pruner.schedule
    times = [schedule.time_of(step) for step in range(pruner.stage.step + 1, schedule.steps + 1)]
    if not times:
        return "no cut is left"
    # What lies behind is due at once.
    shown = list(dict.fromkeys("now" if time <= now else f"{time:,.0f}" for time in times))
    at = ", ".join([*shown[:3], "…", shown[-1]] if len(shown) > 5 else shown)
    where = "now" if shown == ["now"] else f"at {at} {words_of(pruner.facts.unit)}"
    return f"{counted(len(times), 'cut')} to sparsity {schedule.sparsity:g} {where}"


def cut_sentence(step: int, now: int, target: float, size: dict[str, float], pruner: Pruner) -> str:
    """A cut that was just made, in words."""
    return (
        f"cut {step} of {pruner.schedule.steps} at {now:,} {words_of(pruner.facts.unit)}: sparsity "
        f"{size['sparsity']:.3f} ({target:.3f} was asked for), {size['parameters']:,} of "
        f"{sum(pruner.facts.dense.values()):,} parameters are left"
    )


def sentence(record: dict[str, Any], pruner: Pruner) -> str:
    """A finished pruning step in words."""
    recovery, unit = record["recovery"], words_of(pruner.facts.unit)
    took = "not back at 95 %" if recovery is None else f"95 % back after {recovery} {unit}"
    outcome = "kept" if record["kept"] else f"UNDONE: below {record['least']:.4g}"
    step, steps = record["step"], pruner.schedule.steps
    which = f"of {steps}" if step <= steps else "(smaller, in place of one undone)"
    mended = ""
    if "mended" in record:
        offline = counted(record["useful_steps"], "offline step")
        mended = f"{record['mended']['mean']:.4g} after {offline}, "
    return (
        f"cut {step} {which} at {record['cut_at']:,} {unit}: sparsity "
        f"{record['sparsity']:.3f} ({record['parameters']:,} parameters), {pruner.facts.score} "
        f"{record['before']['mean']:.4g} before, {record['after']['mean']:.4g} right after, "
        f"{mended}{record['recovered']['mean']:.4g} recovered ({took}); {outcome}"
    )


def reached(pruner: Pruner, now: int) -> str:
    """What is left at the end of a run, beside what was asked for."""
    found, dense = pruner.outcome(now), sum(pruner.facts.dense.values())
    asked, shortfall = found["asked_sparsity"], found["shortfall"]
    return (
        f"{found['parameters']:,} of {dense:,} parameters are left (sparsity "
        f"{found['sparsity']:.3f}; {asked:g} was asked for), and {found['macs']:,} MACs per "
        f"{'decision' if pruner.facts.score == 'return' else 'reconstruction'}"
        + (f"\nless than asked for: {shortfall}" if shortfall else "")
    )


def doubt(pruner: Pruner) -> str | None:
    """Why the dense networks may be a poor reference, at the first cut; None if they are none."""
    facts, scores = pruner.facts, pruner.stage.dense_scores
    unit = words_of(facts.unit)
    shown = ", ".join(f"{score:.4g} at {time:.0f}" for time, score in scores[-4:])
    if pruner.levelled_off is False:
        return (
            f"the {facts.score} was still rising at the first cut ({shown} {unit}): the dense "
            f"networks had not learnt out; train longer before it (prune.start, {facts.unit})"
        )
    if pruner.levelled_off is None and not pruner.stage.gathered:
        return (
            f"there was only one evaluation before the first cut ({shown} {unit}): whether the "
            f"{facts.score} was still rising is not known; lower eval_every"
        )
    return None


def words_of(unit: str) -> str:
    return unit.replace("_", " ")


def draw_course(folder: RunFolder, unit: str, score: str) -> Figure:
    """Score, sparsity and MACs against time, each cut marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    settings = folder.settings()
    evaluations = folder.read_history("evaluation", "tracking")
    tracked = folder.read_history("tracking")
    cuts, steps = folder.read_history("cut"), folder.read_history("pruning step")
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
        (t[unit], t["sparsity"], t.get("macs")) for t in folder.read_history("tracking", "undone")
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
    bottom.set_xlabel(words_of(unit))
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


def reconstructions(folder: RunFolder, rows: Mapping[str, Tensor]) -> Path:
    """Draw `reconstructions.png`: images `[N, 1, H, W]` by what made them, a row each."""
    from matplotlib.figure import Figure

    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(1 + count * 0.8, 0.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=9)
    path = folder.path / "reconstructions.png"
    write_file(path, png(figure), "run_dir")
    return path


# --- Times ----------------------------------------------------------------------------------

Times = dict[str, dict[str, Any]]  # agent → its size, and "decision_ms" → "median", "p95"


def times(agents: Mapping[str, Agent], decisions: str) -> Times:
    """Each agent's size, and median and 95 % of its time per decision, measured in turn."""
    measured = decision_milliseconds(*agents.values(), repeats=_REPEATS, decisions=decisions)
    found = {}
    for (name, agent), own in zip(agents.items(), measured, strict=True):
        median, p95 = median_and_p95(own)
        found[name] = agent.size()
        found[name]["decision_ms"] = {"median": round(median, 4), "p95": round(p95, 4)}
    return found


def times_table(found: Times) -> str:
    """What `times` measured, as Markdown."""
    rows = [
        (
            name,
            f"{own['sparsity']:.3f}",
            f"{own['parameters']:,}",
            f"{own['macs']:,}",
            f"{own['decision_ms']['median']:.2f}",
            f"{own['decision_ms']['p95']:.2f}",
        )
        for name, own in found.items()
    ]
    names = ["agent", "sparsity", "parameters", "planning MACs", f"{CPU_MS}, median", "95 %"]
    return tabulate(rows, names, "pipe", disable_numparse=True)
