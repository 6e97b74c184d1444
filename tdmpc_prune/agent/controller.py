""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.deciding import NativeDeciding, TorchDeciding, choose
from tdmpc_prune.agent.planner import first_means
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
        decisions: str = "auto",
    ):
        """Take control.

        Args:
            agent: its networks stay on their device, and in their present widths.
            seed: of the planner's noise.
            layout: `envs.observation_layout`, so that errors name the parts of an observation.
            decisions: "auto", "native" or "torch": who decides, see `deciding.choose`.

        Raises:
            UserError: the planner in C was asked for and cannot decide here.
        """
        widths = agent.model.widths
        self.choice = choose(decisions, widths, agent.device)
        self._planner, self._device = agent.config.planner, agent.device
        self._observation_width, self._action_width = widths.observation, widths.action
        self._layout = list(layout)
        self._native = None
        if self.choice.path == "native":
            self._native = NativeDeciding(agent.model, agent.config, seed).planner
        else:
            generator = torch.Generator(self._device).manual_seed(seed)
            self._torch = TorchDeciding(agent.model, agent.config, generator)
        self.reset()

    def reset(self) -> None:
        """A new episode begins."""
        if self._native:
            self._native.means[:] = 0
        else:
            self._means = first_means(self._planner, 1, self._action_width, self._device)

    def act(self, observation: np.ndarray | Sequence[float]) -> np.ndarray:
        """Observation `[O]` → action float32 `[A]` in [-1, 1].

        Whatever holds O real numbers will do: an array of any precision, a list.

        Raises:
            ObservationError: it has another shape, or is not finite; the controller is as before.
        """
        observation = self._checked(observation)
        if native := self._native:
            native.observation[:] = observation
            native.plan()
            native.key.decision += 1
            return native.action.copy()
        inputs = torch.from_numpy(observation).to(self._device).unsqueeze(0)
        decision = self._torch.decide(inputs, self._means)
        self._means = decision.means
        return decision.actions[0].cpu().numpy()

    def _checked(self, observation: Any) -> np.ndarray:
        """A float32 copy."""
        try:
            given = np.asarray(observation)
        except (ValueError, TypeError, RuntimeError) as error:  # ragged; a tensor elsewhere
            raise self._refusal(str(error).strip().splitlines()[0]) from error
        if given.shape != (self._observation_width,):
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
        expected = f"{counted(self._observation_width, 'number')} expected"
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


def decision_milliseconds(
    *agents: Agent, repeats: int = 20, decisions: str = "auto"
) -> list[list[float]]:
    """Times of single decisions of each agent by `clock`, in milliseconds, `repeats` for each.

    The agents decide in turn, so that whatever else the machine does meets all alike; the first
    decision of each is not counted. `decisions` as of `Controller`.
    """
    controllers = [Controller(agent, decisions=decisions) for agent in agents]
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
