"""What a controller may meet outside of its simulator: noise, delay, and a plant that differs."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium
import numpy as np
from tdmpc_prune.envs.errors import TaskError


class Disturb(gymnasium.Wrapper):
    """Noise on observations and actions, and actions that come too late.

    `info["observation"]` is the observation without noise.
    """

    def __init__(
        self, env: gymnasium.Env, observation_noise: float, action_noise: float, delay: int
    ):
        super().__init__(env)
        self._observation_noise, self._action_noise = observation_noise, action_noise
        self._delay = delay

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        observation, info = self.env.reset(seed=seed, options=options)
        # A stream of its own: the environment draws its initial state from `seed` itself.
        self._rng = np.random.default_rng(None if seed is None else [seed, 1])
        self._waiting = [np.zeros(self.action_space.shape, np.float32)] * self._delay
        return self._seen(observation), info | {"observation": observation}

    def step(self, action: np.ndarray):
        self._waiting.append(action)
        noise = self._rng.normal(0.0, self._action_noise, self.action_space.shape)
        action = np.clip(self._waiting.pop(0) + noise, -1.0, 1.0).astype(np.float32)
        observation, *rest, info = self.env.step(action)
        return self._seen(observation), *rest, info | {"observation": observation}

    def _seen(self, observation: np.ndarray) -> np.ndarray:
        noise = self._rng.normal(0.0, self._observation_noise, observation.shape)
        return observation + noise.astype(observation.dtype)


def disturb(
    env: gymnasium.Env,
    observation_noise: float = 0.0,
    action_noise: float = 0.0,
    action_delay: int = 0,
    mass: Mapping[str, float] | None = None,
) -> gymnasium.Env:
    """`env`, made by `make_env`, with disturbances. Its noise follows `reset(seed=…)`.

    Args:
        env: the environment; its physics are changed in place.
        observation_noise: standard deviation, in the units of each observation.
        action_noise: standard deviation, where actions go from -1 to 1; the sum is clipped.
        action_delay: decisions by which every action comes late; the first ones are zero.
        mass: body → factor on its mass and inertia.

    Raises:
        TaskError: there is no such body, or no MuJoCo model.
    """
    if mass:
        _scale_masses(env, mass)
    return Disturb(env, observation_noise, action_noise, action_delay)


def _scale_masses(env: gymnasium.Env, mass: Mapping[str, float]) -> None:
    import mujoco

    model = getattr(env.unwrapped, "model", None)
    if not isinstance(model, mujoco.MjModel):
        raise TaskError("masses can only be changed of a task that runs on MuJoCo")
    for name, factor in mass.items():
        body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name)
        if body < 0:
            bodies = ", ".join(filter(None, (model.body(i).name for i in range(model.nbody))))
            raise TaskError(f"there is no body '{name}'; there are {bodies}")
        model.body_mass[body] *= factor
        model.body_inertia[body] *= factor
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what MuJoCo derives from masses
