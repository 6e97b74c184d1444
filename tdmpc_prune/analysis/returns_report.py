"""Returns beside the published ones, shown: a page, its picture and its CSV."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from tdmpc_prune.analysis.compare import left_out
from tdmpc_prune.analysis.compare_report import short_ticks
from tdmpc_prune.analysis.published import AGENTS, CURVE, Figure
from tdmpc_prune.analysis.returns import EQUAL, TaskReturns, mean_of
from tdmpc_prune.saving.files import png
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.words import csv_text, plus_minus
from tdmpc_prune.words import table as markdown

OURS = "this project"
ROWS = (25_000, 50_000, 100_000)  # env steps; the last only where ours got there
END = 100_000  # env steps that are drawn
_NONE = "–"
_STYLE = {  # colour and marker of each agent
    OURS: ("C0", "o"),
    CURVE: ("black", "."),
    "TD-MPC2": ("C7", "X"),
    "BRO": ("C3", "s"),
    "Simba": ("C1", "^"),
    "SimbaV2": ("C1", "v"),
    "MR.Q": ("C2", "D"),
    "BMPC": ("C4", "P"),
}


def page(found: list[TaskReturns], without: list[Path], out: str, command: str) -> str:
    """All that is to be said, as Markdown.

    Args:
        found: as `returns.read` gives it.
        without: runs that have not been evaluated yet.
        out: of `<out>.png` and `<out>.csv`, which lie beside the page.
        command: that makes the page.
    """
    name = Path(out).name
    alone = [own.task for own in found if not own.published]
    shown = _shown_agents(found)
    stated = [f.agent for own in found for f in own.published if f.spread_kind]
    parts = [
        "# Returns beside the published ones",
        "What dense agents of this project return, seed by seed, beside what others have "
        "published at as many env steps (simulator steps, action repeat included).",
        f"![Return against env steps, by task]({name}.png)",
        "Ours: mean over seeds, band from the lowest to the highest, hollow where fewer seeds got "
        "there than were run. "
        + (f"{CURVE}: mean ± std, dotted before its first update. " if CURVE in shown else "")
        + "Of others there are single points.",
        table(found),
        "Returns are undiscounted, 0 to 1000 on the suite's tasks; ours are means over seeds of "
        f"means over episodes. An evaluation counts at up to {EQUAL} env steps from its row.",
    ]
    if shown:
        parts.append(
            "Published figures are given where they were measured, none is interpolated. ± is the "
            f"standard deviation over seeds for {', '.join(dict.fromkeys(stated))}; of others "
            "neither its kind nor the number of seeds is on file. Simulators differ in version."
        )
    if alone:
        parts.append(f"Nothing published is on file of {', '.join(alone)}.")
    parts += [
        *left_out(without),
        "## What the agents do before their first update",
        agents_table(found),
    ]
    if shown:
        sources = "; ".join(f"{agent} {AGENTS[agent].source}" for agent in shown)
        parts.append(
            f"What an empty cell would say was not found. From {sources}. {CURVE}'s and TD-MPC2's "
            "results are MIT licensed, copyright 2021 and 2023 Nicklas Hansen."
        )
    return "\n\n".join(
        [
            *parts,
            f"Every evaluation, and every published figure with its source: [`{name}.csv`]"
            f"({name}.csv).",
            "## Made with",
            "Runs by the commands that began them, and this page:",
            "```sh\n" + "\n".join([*_commands(found), command]) + "\n```",
        ]
    )


def table(found: list[TaskReturns]) -> str:
    """A row for each task and env steps: ours, TD-MPC and the highest of others; Markdown."""
    rows = []
    for own in found:
        name = own.task
        for env_steps in ROWS:
            ours = own.at(env_steps)
            if env_steps == ROWS[-1] and not ours:
                continue
            seeds = ", ".join(str(m.seed) for m in ours)
            episodes = [str(len(m.returns)) for m in ours]
            rows.append(
                (
                    name,
                    f"{env_steps:,}",
                    f"{mean_of(ours):.0f} ({', '.join(f'{m.mean:.0f}' for m in ours)})"
                    if ours
                    else _NONE,
                    f"{len(ours)} ({seeds})" if ours else "0",
                    ", ".join(episodes if len(set(episodes)) > 1 else episodes[:1]) or _NONE,
                    _curve_at(own, env_steps) or _NONE,
                    "; ".join(
                        f"{figure.agent} {_said(figure)}"
                        for figure in own.published
                        if figure.agent != CURVE and figure.env_steps == env_steps
                    )
                    or _NONE,
                )
            )
            name = ""
    names = ["task", "env steps", "ours (each seed)", "seeds", "episodes of each"]
    return markdown(rows, [*names, f"published: {CURVE}", "published: others"])


def _said(figure: Figure) -> str:
    """ "848 ± 22" or "859 ± 7 (5 seeds)"."""
    shown = plus_minus(figure.mean, float("nan") if figure.spread is None else figure.spread, 0)
    return shown + (f" ({figure.seeds} seeds)" if figure.seeds else "")


def _curve_at(own: TaskReturns, env_steps: int) -> str:
    """The curve's point there, or the measured ones around it, which say where they are."""
    points = [figure for figure in own.published if figure.agent == CURVE]
    if exact := [figure for figure in points if figure.env_steps == env_steps]:
        return _said(exact[0])
    around = [figure for figure in points if figure.env_steps < env_steps][-1:]
    around += [figure for figure in points if figure.env_steps > env_steps][:1]
    return "; ".join(
        f"{_said(figure)} at {figure.env_steps:,}" + (figure.note and f", {figure.note}")
        for figure in around
    )


def agents_table(found: list[TaskReturns]) -> str:
    """Action repeat, beginning and updates of ours and of each published agent shown."""
    alike: dict[tuple[int, float], list[TaskReturns]] = defaultdict(list)
    for own in found:
        learning = own.agent.learning
        alike[learning.seed_decisions, learning.updates_per_decision].append(own)
    rows = []
    for (decisions, updates), tasks in alike.items():
        steps = by_task({own.task: f"{own.action_repeat * decisions:,}" for own in tasks})
        rows.append(
            (
                OURS,
                by_task({own.task: str(own.action_repeat) for own in tasks}),
                f"{decisions:,} random decisions; env steps: {steps}; then "
                f"{int(decisions * updates):,} updates at once",
                f"{updates:g}",
            )
        )
    for name in _shown_agents(found):
        agent = AGENTS[name]
        rows.append((name, agent.action_repeat, agent.start, agent.updates))
    names = ["agent", "action repeat", "before the first update", "updates per decision"]
    return markdown(rows, names)


def by_task(values: dict[str, str]) -> str:
    """ "4", or where tasks differ "8 (cartpole-swingup), 2 (walker-walk)"."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for task, value in values.items():
        tasks[value].append(task)
    return ", ".join(f"{value} ({', '.join(own)})" for value, own in tasks.items())


def _shown_agents(found: list[TaskReturns]) -> list[str]:
    shown = {figure.agent for own in found for figure in own.published}
    return [name for name in AGENTS if name in shown]


def _commands(found: list[TaskReturns]) -> list[str]:
    """The commands that began the runs; those that differ in the seed alone are one loop."""
    seeds: dict[str, list[int]] = defaultdict(list)
    for own in found:
        for run in own.runs:
            words = shlex.split(RunFolder(run.folder).command())
            if {"-m", "--multirun"} & set(words):  # a sweep, which began them all
                seeds[shlex.join(words)] = []
                continue
            rest = [word for word in words if not word.startswith(("seed=", "run_dir="))]
            seeds[shlex.join(rest)].append(run.seed)
    lines = []
    for command, own in seeds.items():
        if len(own) > 1:
            command = f"for seed in {' '.join(map(str, own))}; do {command} seed=$seed; done"
        lines.append(f"{command} seed={own[0]}" if len(own) == 1 else command)
    return lines


def as_csv(found: list[TaskReturns]) -> str:
    """A line for each evaluation of ours and for each published figure."""
    names = ["task", "agent", "seed", "env_steps", "mean", "spread", "spread_kind"]
    names += ["seeds", "episodes", "note", "source"]
    rows = []
    for own in found:
        for run in own.runs:
            for m in run.evaluations:
                value = f"{m.mean:.3f}"
                spread = [f"{np.std(m.returns):.3f}", "population std over episodes"]
                about = [1, len(m.returns), "", run.folder]
                rows.append([own.task, OURS, m.seed, m.env_steps, value, *spread, *about])
        for f in own.published:
            spread = [f.spread, f"{f.spread_kind} over seeds" if f.spread_kind else ""]
            about = [f.seeds, None, f.note, f.source]
            rows.append([own.task, f.agent, None, f.env_steps, f.mean, *spread, *about])
    return csv_text(rows, names)


def picture(found: list[TaskReturns]) -> bytes:
    """A panel for each task: our curve and its band over the published ones, as PNG."""
    columns = math.ceil(math.sqrt(len(found) + 1))  # one place is the legend's
    rows = math.ceil((len(found) + 1) / columns)
    drawing = Drawing(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    places = list(drawing.subplots(rows, columns, squeeze=False).flat)
    for axis, own in zip(places, found, strict=False):
        _draw_published(axis, own)
        _draw_ours(axis, own)
        axis.set_title(own.task, fontsize=10)
        axis.set_xlim(0, END * 1.03)
        lowest = min([m.mean for run in own.runs for m in run.evaluations], default=0)
        axis.set_ylim(bottom=0 if lowest >= 0 else axis.get_ylim()[0])  # of 1000 on the suite
        axis.set_xlabel("env steps", fontsize=9)
        axis.grid(alpha=0.3)
        short_ticks(axis)
    for row in range(rows):
        places[row * columns].set_ylabel("return", fontsize=9)
    for axis in places[len(found) :]:
        axis.axis("off")
    handles = [_handle(name) for name in (OURS, *_shown_agents(found))]
    places[len(found)].legend(handles=handles, loc="center", frameon=False)
    return png(drawing)


def _handle(name: str) -> Line2D:
    colour, marker = _STYLE[name]
    line = "-" if name in (OURS, CURVE) else "none"
    label = f"{name} (mean ± std)" if name == CURVE else name
    label = f"{name} (mean, min to max over seeds)" if name == OURS else label
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label)


def _draw_ours(axis: Axes, own: TaskReturns) -> None:
    colour, marker = _STYLE[OURS]
    points = [point for point in own.curve() if point[0].env_steps <= END]
    x = [float(np.mean([m.env_steps for m in point])) for point in points]
    each = [[m.mean for m in point] for point in points]
    low, high = [min(e) for e in each], [max(e) for e in each]
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, zorder=4)
    axis.plot(x, [np.mean(e) for e in each], color=colour, linewidth=2, zorder=5)
    for at, e in zip(x, each, strict=True):
        inside = colour if len(e) == len(own.runs) else "white"
        axis.plot(at, np.mean(e), marker, color=colour, markersize=4, mfc=inside, zorder=6)


def _draw_published(axis: Axes, own: TaskReturns) -> None:
    curve = [f for f in own.published if f.agent == CURVE and f.env_steps <= END]
    if curve:
        colour, marker = _STYLE[CURVE]
        x, mean = [f.env_steps for f in curve], np.array([f.mean for f in curve])
        spread = np.array([f.spread or 0.0 for f in curve])
        axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.1, linewidth=0)
        first = next(i for i, f in enumerate(curve) if f.learnt)
        style = {"color": colour, "linewidth": 1, "marker": marker, "markersize": 5}
        axis.plot(x[: first + 1], mean[: first + 1], ":", **style)
        axis.plot(x[first:], mean[first:], "-", **style)
    for f in own.published:
        if f.agent != CURVE and f.env_steps <= END:
            colour, marker = _STYLE[f.agent]
            axis.errorbar(
                f.env_steps, f.mean, f.spread, color=colour, marker=marker, markersize=6, zorder=7,
                capsize=3, linewidth=1, clip_on=False,
            )  # fmt: skip
