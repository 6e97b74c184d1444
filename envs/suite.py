"""A DeepMind Control Suite task as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from tdmpc_prune.envs.rendering import choose_gl_backend

_UNLIMITED = 1e9  # dm_control gives an actuator without a control range bounds of ±1e10


class SuiteEnv(gymnasium.Env):
    """One simulator step per `step`; observations flattened to float32 `[O]`.

    `observation_parts` says which parts an observation has, in order: name → size.
    `model` and `data` are MuJoCo's own `MjModel` and `MjData`, for a viewer. An actuator without
    a control range is given [-1, 1]. What the suite randomises once per task (lqr's springs)
    is always the same; what it randomises per episode follows `reset(seed=...)`.
    """

    def __init__(self, domain: str, task: str, render_mode: str | None = None):
        choose_gl_backend()
        from absl import logging
        from dm_control import suite

        shown = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # MuJoCo on what is deprecated in the suite's models
        try:
            self._suite_env = suite.load(domain, task, task_kwargs={"random": 0})
        finally:
            logging.set_verbosity(shown)
        self.render_mode = render_mode
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": round(1 / self._suite_env.control_timestep()),
        }
        specs = self._suite_env.observation_spec()
        self.observation_parts = {name: int(np.prod(spec.shape)) for name, spec in specs.items()}
        width = sum(self.observation_parts.values())
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        action = self._suite_env.action_spec()
        unlimited = action.maximum > _UNLIMITED
        self.action_space = gymnasium.spaces.Box(
            np.where(unlimited, -1.0, action.minimum).astype(np.float32),
            np.where(unlimited, 1.0, action.maximum).astype(np.float32),
        )

    @property
    def model(self):
        return self._suite_env.physics.model.ptr

    @property
    def data(self):
        return self._suite_env.physics.data.ptr

    @property
    def control_timestep(self) -> float:
        """Seconds of simulated time per simulator step."""
        return self._suite_env.control_timestep()

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self._suite_env.task.random.seed(seed % 2**32)
        return self._flat(self._suite_env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time_step = self._suite_env.step(action)
        # The suite ends an episode with discount 0 when the task is over, 1 when time is up.
        terminated = time_step.last() and time_step.discount == 0
        truncated = time_step.last() and not terminated
        return self._flat(time_step.observation), float(time_step.reward), terminated, truncated, {}

    def render(self) -> np.ndarray | None:
        """An RGB picture, uint8 `[480, 640, 3]`, with `render_mode="rgb_array"`."""
        if self.render_mode != "rgb_array":
            return None
        return self._suite_env.physics.render(height=480, width=640, camera_id=0)

    def close(self) -> None:
        self._suite_env.close()

    @staticmethod
    def _flat(observation: dict[str, Any]) -> np.ndarray:
        return np.concatenate(
            [np.asarray(value, np.float32).ravel() for value in observation.values()]
        )
