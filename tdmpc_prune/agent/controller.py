""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.planner import draw_noise, first_means, plan
from tdmpc_prune.errors import UserError
from tdmpc_prune.words import counted

CPU_MS = "CPU ms per decision"


class ObservationError(UserError):
    """An observation that no action can follow from, and what is wrong with it."""


class Controller:
    """An agent in control of one environment: observation in, action out."""

    def __init__(
        self,
        agent: Agent,
        seed: int = 0,
        layout: Sequence[Mapping[str, Any]] = (),
    ):
        """Take control.

        Args:
            agent: its networks stay on their device.
            seed: of the planner's noise.
            layout: `envs.observation_layout`, so that errors name the parts of an observation.
        """
        self._model, self._config = agent.model, agent.config
        self._device = agent.device
        self._action_width = agent.model.widths.action
        self._layout = list(layout)
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """A new episode begins."""
        planner = self._config.planner
        self._means = first_means(planner, 1, self._action_width, self._device)

    def act(self, observation: np.ndarray | Sequence[float]) -> np.ndarray:
        """Observation `[O]` → action float32 `[A]` in [-1, 1].

        Whatever holds O real numbers will do: an array of any precision, a list.

        Raises:
            ObservationError: it has another shape, or is not finite; the controller is as before.
        """
        observation = self._checked(observation)
        planner, discount = self._config.planner, self._config.learning.discount
        noise = draw_noise(planner, 1, self._action_width, self._generator)
        inputs = torch.from_numpy(observation).to(self._device).unsqueeze(0)
        decision = plan(self._model, inputs, self._means, noise, planner, discount)
        self._means = decision.means
        return decision.actions[0].cpu().numpy()

    def _checked(self, observation: Any) -> np.ndarray:
        """A float32 copy."""
        try:
            given = np.asarray(observation)
        except (ValueError, TypeError, RuntimeError) as error:  # ragged; a tensor elsewhere
            raise self._refusal(str(error).strip().splitlines()[0]) from error
        if given.shape != (self._model.widths.observation,):
            raise self._refusal(f"got shape {list(given.shape)}")
        if given.dtype.kind not in "fiub":
            raise self._refusal(f"got {given.dtype}")
        with np.errstate(over="ignore"):  # it is infinite then
            converted = np.array(given, np.float32)
        if not np.isfinite(converted).all():
            at = int(np.flatnonzero(~np.isfinite(converted))[0])
            raise ObservationError(f"observation: {self._name(at)} is {given[at]}, not finite")
        return converted

    def _refusal(self, got: str) -> ObservationError:
        parts = ", ".join(f"{part['name']} {part['size']}" for part in self._layout)
        expected = f"{counted(self._model.widths.observation, 'number')} expected"
        return ObservationError(f"observation: {expected}{parts and f' ({parts})'}; {got}")

    def _name(self, element: int) -> str:
        """What an element of an observation is called."""
        first = 0
        for part in self._layout:
            if element < first + part["size"]:
                return f"{part['name']}[{element - first}] (element {element})"
            first += part["size"]
        return f"element {element}"


def clock(device: torch.device) -> Callable[[], float]:
    """What times a computation, in seconds.

    On the CPU the time that the calling thread computed for: it does not count what else the
    machine does meanwhile. What a GPU does is seen on the wall alone.
    """
    return time.thread_time if device.type == "cpu" else time.perf_counter


def decision_milliseconds(*agents: Agent, repeats: int = 20) -> list[list[float]]:
    """Times of single decisions of each agent by `clock`, in milliseconds, `repeats` for each.

    The agents decide in turn, so that whatever else the machine does meets all alike; the first
    decision of each is not counted.
    """
    controllers = [Controller(agent) for agent in agents]
    observations = [np.zeros(agent.model.widths.observation, np.float32) for agent in agents]
    clocks = [clock(agent.device) for agent in agents]
    times: list[list[float]] = [[] for _ in agents]
    for repeat in range(1 + repeats):
        for controller, observation, now, own in zip(
            controllers, observations, clocks, times, strict=True
        ):
            began = now()
            controller.act(observation)
            if repeat:
                own.append(1000 * (now() - began))
    return times


def median_and_p95(times: Sequence[float]) -> tuple[float, float]:
    """The median, and what 95 % of the times stay within."""
    return float(np.median(times)), float(np.percentile(times, 95))
