"""An agent in control of one environment, and how long its decisions take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.deciding import NativeDeciding, TorchDeciding, choose
from tdmpc_prune.agent.planner import first_means
from tdmpc_prune.errors import UserError
from tdmpc_prune.settings import typed
from tdmpc_prune.words import counted

CPU_MS = "CPU ms per decision"
_REMEMBERED = 10_000  # latest decisions, whose times make the median


class ObservationError(UserError):
    """An observation that no action can follow from, and what is wrong with it."""


@dataclass(frozen=True)
class Statistics:
    """Wall times of a controller's decisions. Median and p95 are of the latest 10,000."""

    decisions: int
    median_ms: float  # nan before the first decision; the same below
    p95_ms: float
    worst_ms: float
    late: int | None  # decisions that took longer than the control period; None: it is not known
    control_period_ms: float | None

    def __str__(self) -> str:
        times = f"median {self.median_ms:.2f}, p95 {self.p95_ms:.2f}, worst {self.worst_ms:.2f} ms"
        late = "" if self.late is None else f"; {self.late} late ({self.control_period_ms:g} ms)"
        return f"{counted(self.decisions, 'decision')}: {times}{late}"


class Controller:
    """An agent in control of one environment: observation in, action out."""

    def __init__(
        self,
        agent: Agent,
        seed: int = 0,
        layout: Sequence[Mapping[str, Any]] | None = None,
        *,
        actuator_units: bool = False,
        control_period: float | None = None,
        decisions: str = "auto",
    ):
        """Take control.

        Args:
            agent: its networks stay on their device, and in their present widths.
            seed: of the planner's noise.
            layout: `envs.observation_layout`, so that errors name the parts of an observation;
                None takes what was saved with the agent.
            actuator_units: give actions in the actuators' own units instead of [-1, 1].
            control_period: seconds from one decision to the next; None takes the task's.
            decisions: "auto", "native" or "torch": who decides, see `deciding.choose`.

        Raises:
            UserError: the actuators' units were not saved with the agent, or the planner in C was
                asked for and cannot decide here.
        """
        known = agent.interface
        if actuator_units and known is None:
            raise UserError(
                f"the limits of the actuators are not in '{agent.folder}', which was saved before "
                f"they were noted; without actuator_units actions are in [-1, 1], and "
                f"{typed('evaluate.py', str(agent.folder), save='with-limits')} saves it with them"
            )
        if layout is None:
            parts = known.observation if known else ()
            layout = [{"name": name, "size": size} for name, size in parts]
        self.agent = agent
        widths = agent.model.widths
        self.choice = choose(decisions, widths, agent.device)
        self._planner, self._device = agent.config.planner, agent.device
        self._width, self._action_width = widths.observation, widths.action
        self._layout = list(layout)
        self._limits = (np.array(known.low), np.array(known.high)) if actuator_units else None
        self._period = control_period or (known.control_period if known else None)
        self._times: deque[float] = deque(maxlen=_REMEMBERED)  # s
        self._decisions = self._late = 0
        self._worst = float("nan")
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
        """Observation `[O]` → action float32 `[A]` in [-1, 1], or in the actuators' own units.

        Whatever holds O real numbers will do: an array of any precision, a list.

        Raises:
            ObservationError: it has another shape, or is not finite; the controller is as before.
        """
        began = time.perf_counter()
        action = self._decided(self._checked(observation))
        if self._limits is not None:
            low, high = self._limits
            action = np.clip(low + (action + 1) * (high - low) / 2, low, high).astype(np.float32)
        self._timed(time.perf_counter() - began)
        return action

    __call__ = act

    @property
    def size(self) -> dict[str, float]:
        """See `Agent.size`."""
        return self.agent.size()

    @property
    def card(self) -> str | None:
        """See `Agent.card`."""
        return self.agent.card

    @property
    def statistics(self) -> Statistics:
        """Of all decisions so far."""
        median, p95 = median_and_p95(self._times) if self._times else (float("nan"),) * 2
        period = self._period
        return Statistics(
            decisions=self._decisions,
            median_ms=1000 * median,
            p95_ms=1000 * p95,
            worst_ms=1000 * self._worst,
            late=None if period is None else self._late,
            control_period_ms=None if period is None else 1000 * period,
        )

    def _decided(self, observation: np.ndarray) -> np.ndarray:
        """`[A]` in [-1, 1]."""
        if native := self._native:
            native.observation[:] = observation
            native.plan()
            native.key.decision += 1
            return native.action.copy()
        inputs = torch.from_numpy(observation).to(self._device).unsqueeze(0)
        decision = self._torch.decide(inputs, self._means)
        self._means = decision.means
        return decision.actions[0].cpu().numpy()

    def _timed(self, seconds: float) -> None:
        self._times.append(seconds)
        self._decisions += 1
        self._worst = seconds if self._decisions == 1 else max(self._worst, seconds)
        self._late += self._period is not None and seconds > self._period

    def _checked(self, observation: Any) -> np.ndarray:
        """A float32 copy."""
        try:
            given = np.asarray(observation)
        except (ValueError, TypeError, RuntimeError) as error:  # ragged; a tensor elsewhere
            raise self._refusal(str(error).strip().splitlines()[0]) from error
        if given.shape != (self._width,):
            batch = given.ndim > 1 and given.shape[-1] == self._width
            hint = ", a batch; give one observation at a time" if batch else ""
            raise self._refusal(f"got shape {list(given.shape)}{hint}")
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
        expected = f"{counted(self._width, 'number')} expected"
        if not parts:
            got += " (what they are was not saved with this agent)"
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
