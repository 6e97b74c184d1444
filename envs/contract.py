"""The border to simulators that others wrote: what comes in is sound, or one line says what is not.

Whatever has one meaning is converted; the rest is refused where it arrives, so that nothing further
inside has to doubt an observation, a reward or an end.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

import gymnasium
import numpy as np
from tdmpc_prune.envs.errors import StepError, TaskError, told
from tdmpc_prune.envs.suite import SuiteEnv

# Of observations and rewards: beyond it, the losses' squares are no longer finite in float32.
_LARGEST = 1e15
_NUMBERS = "biuf"  # kinds of NumPy types


class Checked(gymnasium.Wrapper):
    """A foreign environment, whose every reset and step is checked.

    Observations are float32 `[O]` of our own, flattened; rewards are Python floats, ends are Python
    bools, and `info` is a dict of our own. Actions are clipped to the environment's bounds, in its
    own type.

    Raises:
        TaskError: its observations or actions are not flat Boxes that an agent can act in.
        StepError: by `reset` and `step`: it raised something, or returned what is not as declared.
    """

    def __init__(self, env: gymnasium.Env, task: str):
        super().__init__(env)
        self._task = task
        observed, self._actions = _checked_boxes(env, task)
        self._shape = observed.shape
        with np.errstate(over="ignore"):
            low, high = (
                bound.ravel().astype(np.float32) for bound in (observed.low, observed.high)
            )
        self.observation_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self._step, self._seed = 0, None

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self._step, self._seed = 0, seed
        try:
            returned = self.env.reset(seed=seed, options=options)
        except Exception as error:
            self._refuse(f"its reset raised {told(error)}", error)
        observation, info = self._parts(returned, "reset", "observation", "info")
        return self._observation(observation), self._info(info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._step += 1
        if not np.isfinite(action).all():
            self._refuse(f"it was to execute {action}, an action that is not finite")
        space = self._actions
        own = np.clip(action, space.low, space.high).astype(space.dtype)
        try:
            returned = self.env.step(own)
        except Exception as error:
            self._refuse(f"its step raised {told(error)}", error)
        names = ("observation", "reward", "terminated", "truncated", "info")
        observation, reward, terminated, truncated, info = self._parts(returned, "step", *names)
        return (
            self._observation(observation),
            self._reward(reward),
            self._flag("terminated", terminated),
            self._flag("truncated", truncated),
            self._info(info),
        )

    def close(self) -> None:
        with contextlib.suppress(Exception):  # nothing depends on it any more
            self.env.close()

    def _parts(self, returned: Any, method: str, *names: str) -> tuple | list:
        if not isinstance(returned, (tuple, list)) or len(returned) != len(names):
            several = isinstance(returned, (tuple, list))
            came = f"{len(returned)} values" if several else _described(returned)
            self._refuse(f"its {method} returned {came}, where ({', '.join(names)}) was expected")
        return returned

    def _observation(self, given: Any) -> np.ndarray:
        array = _numbers(given)
        if array is None or array.shape != self._shape:
            self._refuse(
                f"its observation is {_described(given)}, where numbers of shape {self._shape} "
                f"were expected"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            own = array.astype(np.float32).ravel()
            wrong = np.flatnonzero(~(np.abs(own) <= _LARGEST))
        if len(wrong):
            first = int(wrong[0])
            more = f", and so are {len(wrong) - 1} more" if len(wrong) > 1 else ""
            value = _unusable(array.ravel()[first])
            self._refuse(f"observation {first}{self._part_of(first)} is {value}{more}")
        return own

    def _part_of(self, index: int) -> str:
        """What an element of the observation is, where that is known."""
        for part in observation_layout(self):
            if index < part["size"]:
                whole = part["size"] == self.observation_space.shape[0]
                return "" if whole else f" ({part['name']} {index})"
            index -= part["size"]
        return ""

    def _reward(self, given: Any) -> float:
        array = _numbers(given)
        if array is None or array.size != 1:
            self._refuse(f"its reward is {_described(given)}, where one number was expected")
        reward = float(array.item())
        if not abs(reward) <= _LARGEST:
            self._refuse(f"its reward is {_unusable(reward)}")
        return reward

    def _flag(self, name: str, given: Any) -> bool:
        array = _numbers(given)
        if array is None or array.size != 1 or array.item() not in (0, 1):
            self._refuse(f"its '{name}' is {_described(given)}, where True or False was expected")
        return bool(array.item())

    def _info(self, given: Any) -> dict[str, Any]:
        if given is not None and not isinstance(given, Mapping):
            self._refuse(f"its info is {_described(given)}, where a dict was expected")
        return dict(given or {})

    def _refuse(self, fault: str, cause: Exception | None = None) -> NoReturn:
        episode = "the episode" if self._seed is None else f"the episode from seed {self._seed}"
        place = f"in step {self._step} of {episode}" if self._step else f"at the reset of {episode}"
        raise StepError(f"task '{self._task}': {fault} ({place})") from cause


def _checked_boxes(
    env: gymnasium.Env, task: str
) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """The spaces of observations and actions. Raises TaskError: they are not for an agent."""
    spaces = []
    for what, name in (("observations", "observation_space"), ("actions", "action_space")):
        try:
            space = getattr(env, name)
        except Exception as error:
            raise TaskError(f"task '{task}' has no {name}: {told(error)}") from error
        if not isinstance(space, gymnasium.spaces.Box):
            raise TaskError(
                f"task '{task}' has {type(space).__name__} {what}; "
                f"this agent needs continuous ones (a Box)"
            )
        if 0 in space.shape:
            raise TaskError(f"task '{task}' has no {what} (a Box of shape {space.shape})")
        spaces.append(space)
    observed, actions = spaces
    if len(observed.shape) > 2:
        raise TaskError(
            f"task '{task}' observes pictures of shape {observed.shape}; "
            f"this agent needs a vector of states"
        )
    _check_actions(actions, task)
    return observed, actions


def _check_actions(space: gymnasium.spaces.Box, task: str) -> None:
    """Refuse actions that [-1, 1] cannot be rescaled to."""
    if len(space.shape) != 1:
        raise TaskError(f"task '{task}' has actions of shape {space.shape}; needs [A]")
    if space.dtype.kind != "f":
        raise TaskError(
            f"task '{task}' has {space.dtype} actions; this agent needs continuous ones "
            f"(a Box of dtype float32)"
        )
    if not np.isfinite(space.low).all() or not np.isfinite(space.high).all():
        raise TaskError(f"task '{task}' has unbounded actions; give it finite action bounds")
    with np.errstate(over="ignore", divide="ignore"):
        scales = 2 / (space.high - space.low)
    for i, (low, high, scale) in enumerate(zip(space.low, space.high, scales, strict=True)):
        if low >= high:
            raise TaskError(
                f"task '{task}': action {i} is locked (its bounds are [{low:g}, {high:g}]); leave "
                f"it out of the action space, and set it inside the environment"
            )
        if not np.finfo(space.dtype).tiny <= scale < np.inf:
            raise TaskError(
                f"task '{task}': action {i} cannot be rescaled from [-1, 1] to its bounds "
                f"[{low:g}, {high:g}] in {space.dtype}; give it others"
            )


def _numbers(given: Any) -> np.ndarray | None:
    """What was given as an array of numbers; None if it is no such thing."""
    try:
        array = np.asarray(given)
    except Exception:  # ragged lists, foreign arrays
        return None
    return array if array.dtype.kind in _NUMBERS else None


def _described(value: Any) -> str:
    """A foreign value in a few words, on one line."""
    shape, kind = getattr(value, "shape", None), type(value).__name__
    if isinstance(shape, tuple):
        return f"a {kind} of shape {shape} and type {getattr(value, 'dtype', '?')}"
    if isinstance(value, (tuple, list)):
        array = _numbers(value)
        return f"a {kind} of shape {array.shape}" if array is not None else f"a mixed {kind}"
    return f"{' '.join(reprlib.repr(value).split())} (a {kind})"


def _unusable(value: Any) -> str:
    text = f"{value:g}"
    return f"{text}, too large for an agent in float32" if np.isfinite(value) else text


def observation_layout(env: gymnasium.Env) -> list[dict[str, str | int]]:
    """What the numbers of an observation are, in order: name and count of each part."""
    inner = env.unwrapped
    parts = {"observation": env.observation_space.shape[0]}
    if isinstance(inner, SuiteEnv):  # the name may mean something else in a foreign one
        parts = inner.observation_parts
    return [{"name": name, "size": size} for name, size in parts.items()]


def action_limits(env: gymnasium.Env) -> tuple[np.ndarray, np.ndarray]:
    """What actions of −1 and 1 are in the actuators' own units, `[A]` each; `env` of `make_env`."""
    while not isinstance(env, Checked):
        env = env.env
    return env.action_space.low, env.action_space.high


def simulator_step_seconds(env: gymnasium.Env) -> float | None:
    """Simulated time of one simulator step, in seconds; None if the environment does not say."""
    return _positive(env, "control_timestep") or _positive(env, "dt")


def frame_seconds(env: gymnasium.Env) -> float | None:
    """Time for which a picture of one simulator step is to be shown, in seconds.

    That of the step; or from `metadata["render_fps"]`. None if the environment says neither.
    """
    rate = _positive(env, "metadata", "render_fps")
    return simulator_step_seconds(env) or (1 / rate if rate else None)


def _positive(env: gymnasium.Env, name: str, key: str | None = None) -> float | None:
    """A positive number under a foreign environment's attribute; None if it is anything else."""
    try:
        value = getattr(env.unwrapped, name)
        value = _numbers(value[key] if key else value)
    except Exception:  # absent, or a property that fails
        return None
    if value is None or value.size != 1 or value.dtype.kind == "b":
        return None
    number = float(value.item())
    return number if 0 < number < np.inf else None
