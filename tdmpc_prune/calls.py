"""The main commands as functions: `train(task=…)`, `prune(checkpoint, …)`.

Settings are those of the commands, with the same names, defaults, checks and errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tdmpc_prune.command_line import composed
from tdmpc_prune.machine import set_threads
from tdmpc_prune.settings import quoted
from tdmpc_prune.training import launch
from tdmpc_prune.training.config import PruneCheckpointConfig, TrainConfig
from tdmpc_prune.training.run import Run


def train(**settings: Any) -> Run:
    """Train an agent, or go on with a run (`resume=<its folder>`), to the end.

    `train(task="cartpole-swingup", prune="bayesian", model={"planner": {"samples": 128}})`;
    PyTorch's threads are set to `threads`, which is 1 if it is not given.

    Args:
        settings: as of `train.py`; those of a group as a dict, or by `**{"prune.steps": 4}`.

    Returns:
        The finished run: `folder`, `history` and the last measurement, `measured`.

    Raises:
        UserError, TaskError: see `launch.start` and `launch.resume`.
        RunError, Stopped: see `Run.run`.
    """
    words = list(_typed(settings))
    config, given = composed(TrainConfig, words)
    set_threads(config.threads)
    resumed = bool(config.resume)
    run = launch.resume(config, given) if resumed else launch.start(config, ["train.py", *words])
    run.run()
    return run


def prune(checkpoint: str | Path, prune: str | None = None, **settings: Any) -> Run:
    """Prune a finished agent or autoencoder: one refitted cut, or several with training after each.

    Args:
        checkpoint: a run's folder, or a checkpoint.
        prune: what ranks the units; None is `compensated`.
        settings: as of `prune.py`; see `train`.

    Returns:
        The finished run.

    Raises:
        UserError: see `launch.pruning_run` and `launch.start`.
        RunError, Stopped: see `Run.run`.
    """
    settings = {"checkpoint": checkpoint} | ({"prune": prune} if prune else {}) | settings
    words = list(_typed(settings))
    config, given = composed(PruneCheckpointConfig, words)
    set_threads(config.threads)
    run = launch.start(launch.pruning_run(config, given), ["prune.py", *words])
    run.run()
    return run


def _typed(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings as they are typed: `prune.steps=4`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _typed(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_value(value)}"


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_value, value))}]"
    return str(value) if isinstance(value, (int, float)) else quoted(str(value))
