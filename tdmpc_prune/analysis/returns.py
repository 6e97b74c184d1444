"""Returns of dense runs, task by task, beside the published ones at equal env steps.

Everything of ours comes from the runs' folders. Runs that cannot be averaged are refused.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.analysis import compare
from tdmpc_prune.analysis.compare import Measured
from tdmpc_prune.analysis.published import Figure, figures
from tdmpc_prune.envs.tasks import default_action_repeat
from tdmpc_prune.errors import UserError
from tdmpc_prune.settings import by_dotted_name, to_plain
from tdmpc_prune.training.config import TrainConfig

TASKS = ("cartpole-swingup", "walker-walk", "cheetah-run", "reacher-easy", "pendulum-swingup")
EQUAL = 500  # env steps between two evaluations that count as at equal env steps: half an episode
_NAMED = 3  # settings that an error names at most


@dataclass(frozen=True)
class DenseRun:
    """One seed of ours."""

    folder: str
    seed: int
    evaluations: tuple[Measured, ...]  # in order of env steps

    def at(self, env_steps: int) -> Measured | None:
        """The evaluation nearest to `env_steps`; None if none is within half an episode."""
        near = min(self.evaluations, key=lambda m: abs(m.env_steps - env_steps))
        return near if abs(near.env_steps - env_steps) <= EQUAL else None


@dataclass(frozen=True)
class TaskReturns:
    """All that is known of one task."""

    task: str
    action_repeat: int  # of ours; simulator steps per decision
    agent: AgentConfig  # of ours, the same in all runs
    runs: tuple[DenseRun, ...]  # by seed
    published: tuple[Figure, ...]

    def at(self, env_steps: int) -> list[Measured]:
        """What each seed that got there returned at `env_steps`."""
        return [found for run in self.runs if (found := run.at(env_steps))]

    def curve(self) -> list[list[Measured]]:
        """Every evaluation, those of different seeds at equal env steps together."""
        every = [m for run in self.runs for m in run.evaluations]
        points: list[list[Measured]] = []
        for m in sorted(every, key=lambda m: (m.env_steps, m.seed)):
            last = points[-1] if points else []
            equal = last and m.env_steps - last[0].env_steps <= EQUAL
            if equal and m.run not in [other.run for other in last]:
                last.append(m)
            else:
                points.append([m])
        return points


def read(run_dirs: list[Path]) -> tuple[list[TaskReturns], list[Path]]:
    """What dense runs reached, by task, and the runs that have not been evaluated yet.

    Raises:
        UserError: two runs cannot be averaged, and what differs; or one is not dense; or none has
            been evaluated.
    """
    measured, without = compare.read(run_dirs)
    if not measured:
        raise UserError("; ".join(compare.left_out(without)))
    evaluated: dict[str, dict[int, Measured]] = defaultdict(dict)
    for m in measured:
        if m.moment == "evaluation":
            evaluated[m.run][m.env_steps] = m
    configs = {run: compare.settings_of(Path(run)) for run in {m.run: None for m in measured}}
    _check(configs)
    tasks: dict[str, list[str]] = defaultdict(list)
    for run, config in configs.items():
        tasks[config.task].append(run)
    found = [
        TaskReturns(
            task=task,
            action_repeat=_action_repeat(configs[own[0]]),
            agent=configs[own[0]].model,
            runs=tuple(
                DenseRun(run, configs[run].seed, tuple(evaluated[run][at] for at in times))
                for run in sorted(own, key=lambda run: configs[run].seed)
                for times in [sorted(evaluated[run])]
            ),
            published=tuple(figure for figure in figures() if figure.task == task),
        )
        for task, own in sorted(tasks.items(), key=lambda pair: _place(pair[0]))
    ]
    return found, without


def _place(task: str) -> tuple[int, str]:
    """The benchmark's tasks first, in its order."""
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)


def _action_repeat(config: TrainConfig) -> int:
    return config.action_repeat or default_action_repeat(config.task)


def _check(configs: dict[str, TrainConfig]) -> None:
    """Refuse what is no seed of one dense agent on each task."""
    for one, other in combinations(configs, 2):
        a, b = configs[one], configs[other]
        if a.task != b.task:
            continue
        ours, theirs = _what_counts(a), _what_counts(b)
        differ = [
            f"{name} ({value} and {theirs[name]})"
            for name, value in ours.items()
            if value != theirs[name]
        ]
        if not differ and a.seed == b.seed:
            raise UserError(f"'{one}' and '{other}' are one seed twice: {a.task}, seed={a.seed}")
        if differ:
            more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
            raise UserError(
                f"'{one}' and '{other}' cannot be averaged; they differ in "
                f"{', '.join(differ[:_NAMED])}{more}"
            )
    for run, config in configs.items():
        if config.prune.method != "none":
            raise UserError(f"'{run}' is not a dense run: prune={config.prune.method}")
        if config.start_from:
            raise UserError(f"'{run}' is not from scratch: start_from={config.start_from}")


def _what_counts(config: TrainConfig) -> dict[str, Any]:
    """The settings that runs must share for their mean to mean something."""
    return {
        "prune": config.prune.method,
        "start_from": config.start_from,
        "action_repeat": _action_repeat(config),
    } | by_dotted_name(to_plain(config.model), "model.")


def mean_of(found: list[Measured]) -> float:
    """Mean over seeds of the mean over each one's episodes."""
    return float(np.mean([m.mean for m in found]))
