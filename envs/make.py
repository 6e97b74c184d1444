"""From a task's name to an environment that an agent can act in."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
from gymnasium import wrappers

from envs.rendering import choose_gl_backend
from envs.suite import SuiteEnv
from envs.tasks import (
    GYM_PREFIX,
    TaskError,
    closest_gym_ids,
    default_action_repeat,
    find_suite_task,
)

# A suite episode, in simulator steps; also the limit of a task that sets none of its own.
EPISODE_ENV_STEPS = 1000


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
    are MuJoCo's own where the task runs on MuJoCo.

    Args:
        task: `cartpole-swingup` and the like, or `gym:<id>`.
        action_repeat: simulator steps per decision; None takes the task's own.
        render_mode: "rgb_array" or None.

    Raises:
        TaskError: the task is unknown, or its observations or actions are not flat Boxes.
    """
    if action_repeat is not None and action_repeat < 1:
        raise TaskError(f"action_repeat={action_repeat} must be at least 1")
    if task.startswith(GYM_PREFIX):
        env = _make_gym(task, render_mode)
    else:
        suite_env = SuiteEnv(*find_suite_task(task), render_mode=render_mode)
        env = wrappers.TimeLimit(suite_env, EPISODE_ENV_STEPS)
    env = wrappers.RepeatAction(CountEnvSteps(env), action_repeat or default_action_repeat(task))
    env = wrappers.ClipAction(_rescale_action(env, task))
    env.action_space = gymnasium.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    return env


def simulator_step_seconds(env: gymnasium.Env) -> float | None:
    """Simulated time of one simulator step, in seconds; None if the environment does not say."""
    inner = env.unwrapped
    return getattr(inner, "control_timestep", None) or getattr(inner, "dt", None)


def observation_layout(env: gymnasium.Env) -> list[dict[str, str | int]]:
    """What the numbers of an observation are, in order: name and count of each part."""
    whole = {"observation": env.observation_space.shape[0]}
    parts = getattr(env.unwrapped, "observation_parts", whole)
    return [{"name": name, "size": size} for name, size in parts.items()]


def _make_gym(task: str, render_mode: str | None) -> gymnasium.Env:
    choose_gl_backend()
    gym_id = task.removeprefix(GYM_PREFIX)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium on older versions of its own tasks
            env = gymnasium.make(gym_id, render_mode=render_mode, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv as error:
        raise TaskError(f"unknown task '{task}'; {closest_gym_ids(gym_id)}") from error
    except (gymnasium.error.Error, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TaskError(f"task '{task}' cannot be made: {reason}") from error
    _require_flat_boxes(env, task)
    if env.spec is None or env.spec.max_episode_steps is None:
        env = wrappers.TimeLimit(env, EPISODE_ENV_STEPS)
    if len(env.observation_space.shape) != 1:
        env = wrappers.FlattenObservation(env)
    if env.observation_space.dtype != np.float32:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # float64 bounds lose precision, which is the purpose
            env = wrappers.DtypeObservation(env, np.float32)
    return env


def _require_flat_boxes(env: gymnasium.Env, task: str) -> None:
    for what, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gymnasium.spaces.Box):
            raise TaskError(
                f"task '{task}' has {type(space).__name__} {what}; "
                f"this agent needs continuous ones (a Box)"
            )
    if len(env.observation_space.shape) > 2:
        raise TaskError(
            f"task '{task}' observes pictures of shape {env.observation_space.shape}; "
            f"this agent needs a vector of states"
        )
    if len(env.action_space.shape) != 1:
        raise TaskError(f"task '{task}' has actions of shape {env.action_space.shape}; needs [A]")


def _rescale_action(env: gymnasium.Env, task: str) -> gymnasium.Env:
    space = env.action_space
    if not np.isfinite(space.low).all() or not np.isfinite(space.high).all():
        raise TaskError(f"task '{task}' has unbounded actions; give it finite action bounds")
    return wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))
