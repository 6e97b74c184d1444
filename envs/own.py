"""Environments of one's own: `file:my_env.py:Arm`, a class or function in a Python file."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium import wrappers
from tdmpc_prune.envs.errors import TaskError, told
from tdmpc_prune.envs.tasks import FILE_PREFIX


def let_import_from_here() -> None:
    """Let the current folder's modules be found, after all others."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def make_from_file(task: str, render_mode: str | None) -> tuple[gymnasium.Env, bool]:
    """An environment of a file, and whether it brings a time limit.

    Raises:
        TaskError: there is no such file, nothing of that name in it, or it makes no environment.
    """
    path, _, name = task.removeprefix(FILE_PREFIX).rpartition(":")
    module = _module(task, Path(path or name))
    if not path:
        raise TaskError(f"task '{task}' does not say what makes the environment; {_names(module)}")
    maker = getattr(module, name, None)
    if not callable(maker):
        raise TaskError(
            f"task '{task}' cannot be made: '{path}' has no class or function '{name}'; "
            f"{_names(module, name)}"
        )
    try:
        env = maker(**({"render_mode": render_mode} if render_mode else {}))
    except Exception as error:
        if render_mode and "unexpected keyword argument 'render_mode'" in str(error):
            raise TaskError(
                f"task '{task}' cannot be drawn: '{name}' takes no render_mode; give it the "
                f"argument render_mode=None and keep it as self.render_mode"
            ) from error
        raise TaskError(f"task '{task}' cannot be made: {told(error)}") from error
    if not isinstance(env, gymnasium.Env):
        raise TaskError(
            f"task '{task}' cannot be made: '{name}' gives a {type(env).__name__}, and a "
            f"gymnasium.Env is needed"
        )
    return env, _has_time_limit(env)


def _module(task: str, path: Path) -> Any:
    """The file as a module, loaded once; what lies beside it can be imported."""
    if not path.is_file():
        raise TaskError(
            f"task '{task}' cannot be made: there is no file '{path}' in '{Path.cwd()}'; paths are "
            f"relative to the current folder, as in task={FILE_PREFIX}my_env.py:Arm"
        )
    let_import_from_here()
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise TaskError(f"task '{task}' cannot be made: '{path.name}' is no Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ModuleNotFoundError):
            raise TaskError(
                f"task '{task}' cannot be made: it needs the module '{error.name}'; is it "
                f"installed?"
            ) from error
        if isinstance(error, (Exception, SystemExit)):
            raise TaskError(f"task '{task}' cannot be made: {told(error)}") from error
        raise
    return module


def _names(module: Any, wanted: str = "") -> str:
    """What of a file can be named, the closest first."""

    def own(value: Callable) -> bool:
        return callable(value) and getattr(value, "__module__", None) == module.__name__

    found = [n for n, value in vars(module).items() if own(value) and not n.startswith("_")]
    found = difflib.get_close_matches(wanted, found, n=3) or found
    file = os.path.relpath(module.__file__)
    if not found:
        return f"'{file}' defines none"
    return f"give task={FILE_PREFIX}{file}:{' or :'.join(found[:3])}"


def _has_time_limit(env: gymnasium.Env) -> bool:
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, wrappers.TimeLimit):
            return True
        env = env.env
    return False


def report(task: str, env: gymnasium.Env, action_repeat: int) -> str:
    """What an agent will see of a task, for a person to check before training.

    Args:
        task: its name.
        env: of `make_env`; it is reset.
        action_repeat: simulator steps per decision.

    Raises:
        StepError: it cannot be played.
    """
    from tdmpc_prune.envs.contract import action_limits, observation_layout, simulator_step_seconds

    space, (low, high) = env.observation_space, action_limits(env)
    parts = ", ".join(f"{part['name']} {part['size']}" for part in observation_layout(env))
    actions = ", ".join(f"[{a:g}, {b:g}]" for a, b in zip(low[:4], high[:4], strict=True))
    more = f" and {len(low) - 4} more" if len(low) > 4 else ""
    seconds, limit = simulator_step_seconds(env), _limit(env)
    step = f"{seconds:g} s" if seconds else "not said (give the class 'dt = 0.05', in seconds)"
    period = f", control period {seconds * action_repeat:g} s" if seconds else ""
    return "\n".join(
        [
            f"task {task}",
            f"  observations    {space.shape[0]} ({parts}) between {space.low.min():g} and "
            f"{space.high.max():g}",
            f"  actions         {len(low)}, rescaled from [-1, 1] to {actions}{more}",
            f"  simulator step  {step}; {action_repeat} per decision{period}",
            f"  time limit      {limit}",
            f"  seeding         {_seeding(env)}",
        ]
    )


def _limit(env: gymnasium.Env) -> str:
    limits = []
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, wrappers.TimeLimit):
            limits.append(env._max_episode_steps)
        env = env.env
    return f"{min(limits)} simulator steps, if it does not end before" if limits else "its own"


def _seeding(env: gymnasium.Env) -> str:
    """Whether the same seed and actions give the same episode."""
    episodes = []
    for _ in range(2):
        observation, _ = env.reset(seed=1)
        seen = [observation.tobytes()]
        for _ in range(5):
            observation, reward, terminated, truncated, _ = env.step(0 * env.action_space.high)
            seen += [observation.tobytes(), reward]
            if terminated or truncated:
                break
        episodes.append(seen)
    if episodes[0] == episodes[1]:
        return "repeats"
    return (
        "does not repeat: the same seed gives other episodes, so that agents are not compared on "
        "the same ones, and a stopped episode is lost; draw from self.np_random"
    )
