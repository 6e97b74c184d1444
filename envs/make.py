"""From a task's name to an environment that an agent can act in."""

from __future__ import annotations

import importlib
import os
import sys
import warnings

import gymnasium
import numpy as np
from gymnasium import wrappers
from tdmpc_prune.envs.contract import Checked
from tdmpc_prune.envs.errors import TaskError, told
from tdmpc_prune.envs.own import let_import_from_here, make_from_file
from tdmpc_prune.envs.rendering import choose_gl_backend
from tdmpc_prune.envs.suite import SuiteEnv
from tdmpc_prune.envs.tasks import (
    FILE_PREFIX,
    GYM_PREFIX,
    closest_gym_tasks,
    default_action_repeat,
    find_suite_task,
)

# A suite episode, in simulator steps; also the limit of a task that sets none of its own.
EPISODE_ENV_STEPS = 1000


def draw_nothing(task: str) -> None:
    """Leave out MuJoCo's renderer, which costs time and memory, where only `task` is played.

    MuJoCo must not have been imported yet. A `MUJOCO_GL` that the user has set is left alone, and
    so are tasks that others wrote, which may draw what they observe.
    """
    if sys.platform == "linux" and not task.startswith((GYM_PREFIX, FILE_PREFIX)):
        os.environ.setdefault("MUJOCO_GL", "disable")


class CountEnvSteps(gymnasium.Wrapper):
    """Puts the simulator steps taken in this episode into `info["env_steps"]`."""

    def reset(self, **kwargs):
        self._env_steps = 0
        observation, info = self.env.reset(**kwargs)
        return observation, info | {"env_steps": 0}

    def step(self, action):
        self._env_steps += 1
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, info | {"env_steps": self._env_steps}


def make_env(
    task: str, action_repeat: int | None = None, render_mode: str | None = None
) -> gymnasium.Env:
    """The environment of `task`.

    Observations are float32 `[O]`, actions float32 `[A]` in [-1, 1]. One `step` is one decision:
    it repeats the action for `action_repeat` simulator steps and sums their rewards, and
    `info["env_steps"]` counts simulator steps since the reset. `env.unwrapped.model` and `.data`
    are MuJoCo's own where the task runs on MuJoCo. What a simulator returns is checked where it
    comes in: `reset` and `step` raise a StepError, which is a TaskError, see `envs.contract`.

    Args:
        task: `cartpole-swingup` and the like, `gym:<id>`, or `file:<path>:<name>`.
        action_repeat: simulator steps per decision; None takes the task's own.
        render_mode: "rgb_array" or None.

    Raises:
        TaskError: the task is unknown or cannot be made, or its observations or actions are not
            flat Boxes.
    """
    if action_repeat is not None and action_repeat < 1:
        raise TaskError(f"action_repeat={action_repeat} must be at least 1")
    if task.startswith(GYM_PREFIX):
        simulator, limit = _make_gym(task, render_mode)
    elif task.startswith(FILE_PREFIX):
        choose_gl_backend()
        simulator, limited = make_from_file(task, render_mode)
        limit = None if limited else EPISODE_ENV_STEPS
    else:
        simulator, limit = _make_suite(task, render_mode), EPISODE_ENV_STEPS
    env = Checked(simulator, task)
    if limit:
        env = wrappers.TimeLimit(env, limit)
    env = wrappers.RepeatAction(CountEnvSteps(env), action_repeat or default_action_repeat(task))
    with np.errstate(over="ignore"):  # in Gymnasium's infinite Boxes
        env = wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))
        env = wrappers.ClipAction(env)
    env.action_space = gymnasium.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    return env


def _make_suite(task: str, render_mode: str | None) -> SuiteEnv:
    domain, name = find_suite_task(task)
    try:
        return SuiteEnv(domain, name, render_mode=render_mode)
    except Exception as error:
        raise TaskError(f"task '{task}' cannot be made: {told(error)}") from error


def _make_gym(task: str, render_mode: str | None) -> tuple[gymnasium.Env, int | None]:
    """A Gymnasium environment, and the time limit that it still needs."""
    choose_gl_backend()
    module, _, gym_id = task.removeprefix(GYM_PREFIX).rpartition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium on older versions of its own tasks
            let_import_from_here()
            if module:
                importlib.import_module(module)
            # A class may know no render_mode at all; one that is registered with it gets ours.
            registered = gymnasium.registry.get(gym_id)
            drawn = render_mode is not None or (registered and "render_mode" in registered.kwargs)
            env = gymnasium.make(
                gym_id,
                max_episode_steps=-1,  # the time limit comes after the checks
                disable_env_checker=True,
                **({"render_mode": render_mode} if drawn else {}),
            )
            limit = gymnasium.registry[env.unwrapped.spec.id].max_episode_steps
            own_limit = env.spec.max_episode_steps  # of a wrapper that came with it
    except Exception as error:  # foreign constructors have errors of every kind
        raise TaskError(_why_not_made(task, error)) from error
    return env, limit or (None if own_limit else EPISODE_ENV_STEPS)


def _why_not_made(task: str, error: Exception) -> str:
    module, _, gym_id = task.removeprefix(GYM_PREFIX).rpartition(":")
    missing = getattr(error, "name", None)
    if isinstance(error, gymnasium.error.NamespaceNotFound):
        namespace = gym_id.partition("/")[0]
        return (
            f"unknown task '{task}': nothing has registered the namespace '{namespace}'; is the "
            f"package installed? If so, name its module, too: gym:<module>:{namespace}/…"
        )
    if isinstance(error, (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv)):
        return f"unknown task '{task}'; {closest_gym_tasks(module, gym_id)}"
    if isinstance(error, ModuleNotFoundError) and missing:
        if f"{module}.".startswith(f"{missing}."):
            return (
                f"task '{task}' cannot be made: there is no module '{missing}'; is the package "
                f"installed, or the module's folder in PYTHONPATH?"
            )
        return f"task '{task}' cannot be made: it needs the module '{missing}'; is it installed?"
    if "unexpected keyword argument 'render_mode'" in str(error):
        return (
            f"task '{task}' cannot be drawn: its class takes no render_mode; give its __init__ "
            f"the argument render_mode=None and keep it as self.render_mode"
        )
    return f"task '{task}' cannot be made: {told(error)}"
