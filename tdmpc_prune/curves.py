"""Learning curves: evaluation returns against env steps, from the folders of runs alone."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tdmpc_prune.checkpoint import read_run
from tdmpc_prune.errors import UserError


@dataclass(frozen=True)
class Point:
    """One evaluation of one run."""

    task: str
    seed: int
    env_steps: int
    episode: int
    episode_return: float


def read_points(run_dirs: list[Path]) -> list[Point]:
    """Every episode of every evaluation of the runs.

    Raises:
        UserError: a folder is no run, or a run has not been evaluated yet.
    """
    points = []
    for run_dir in run_dirs:
        settings = read_run(run_dir)
        path = run_dir / "history.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [entry for entry in map(json.loads, lines) if entry["kind"] == "evaluation"]
        if not entries:
            raise UserError(f"'{run_dir}' has not been evaluated yet")
        points += [
            Point(settings["task"], settings["seed"], entry["env_steps"], episode, value)
            for entry in entries
            for episode, value in enumerate(entry["returns"])
        ]
    return points


def write_csv(points: list[Point], path: Path) -> None:
    """One line per episode of an evaluation."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "seed", "env_steps", "episode", "episode_return"])
        writer.writerows(
            (p.task, p.seed, p.env_steps, p.episode, f"{p.episode_return:.3f}") for p in points
        )


def means_by_seed(points: list[Point]) -> dict[str, dict[int, dict[int, float]]]:
    """Mean return by task, env steps and seed."""
    episodes = defaultdict(list)
    for p in points:
        episodes[p.task, p.env_steps, p.seed].append(p.episode_return)
    means: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (task, env_steps, seed), returns in sorted(episodes.items()):
        means[task][env_steps][seed] = float(np.mean(returns))
    return means


def table(points: list[Point]) -> str:
    """Mean over seeds, and each seed's mean, at every evaluation, as Markdown."""
    lines = ["| task | env steps | seeds | mean return | per seed |", "|---|---|---|---|---|"]
    for task, curve in means_by_seed(points).items():
        for env_steps, seeds in curve.items():
            each = ", ".join(f"{value:.0f}" for value in seeds.values())
            mean = np.mean(list(seeds.values()))
            lines.append(f"| {task} | {env_steps} | {len(seeds)} | {mean:.0f} | {each} |")
    return "\n".join(lines)


def draw(points: list[Point], path: Path) -> None:
    """A panel per task: a thin line per seed, a thick one for their mean."""
    tasks = means_by_seed(points)
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(1 + 3.4 * len(tasks), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (task, curve) in zip(axes[0], tasks.items(), strict=True):
        seeds = sorted({seed for values in curve.values() for seed in values})
        for seed in seeds:
            own = [(steps, values[seed]) for steps, values in curve.items() if seed in values]
            axis.plot(*zip(*own, strict=True), color="C0", alpha=0.4, linewidth=1)
        shared = [s for s, values in curve.items() if len(values) == len(seeds)]
        mean = [np.mean(list(curve[steps].values())) for steps in shared]
        axis.plot(shared, mean, color="C0", linewidth=2, marker="o", markersize=3)
        axis.set_title(f"{task} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})", fontsize=10)
        axis.set_xlabel("env steps (simulator steps)")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("evaluation return")
    figure.savefig(path, dpi=120)
    plt.close(figure)
