"""How good an agent is, and how big and how fast: returns over whole episodes, and figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch

from envs import StepError, disturb, make_env
from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.planner import draw_noise, first_means, plan, planning_macs
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import UserError
from tdmpc_prune.words import counted


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns of some episodes."""

    returns: list[float]  # one per episode
    decisions: int  # planner decisions, over all episodes
    seconds: float  # wall time

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Population standard deviation over the episodes."""
        return float(np.std(self.returns))

    def first(self, episodes: int) -> Evaluation:
        """Its first episodes alone; decisions and seconds stay those of all."""
        return replace(self, returns=self.returns[:episodes])


def _refuse(error: StepError) -> None:
    raise error


def evaluate(
    model: WorldModel,
    config: AgentConfig,
    task: str,
    action_repeat: int | None,
    episodes: int,
    seed: int,
    interrupted: Callable[[], bool] = lambda: False,
    watch: Callable[[int, np.ndarray, bool], None] = lambda episode, observation, terminated: None,
    disturbances: Mapping[str, Any] | None = None,
    broken: Callable[[StepError], None] = _refuse,
) -> Evaluation | None:
    """Play `episodes` whole episodes without exploration.

    Episode i starts from the environment's seed `seed + i`, so that agents that are compared with
    the same seed face the same initial states.

    Args:
        model: the agent's networks; they stay on their device.
        config: its planner and discount are used.
        task: as for `envs.make_env`.
        action_repeat: likewise.
        episodes: how many, all planned together.
        seed: of initial states and planner noise.
        interrupted: asked before every decision; when true the evaluation ends with None.
        watch: told of every observation `[O]` of every episode, as it is without noise, and
            whether the episode terminated there (a time limit does not count).
        disturbances: arguments of `envs.disturb`; None leaves the task as it is.
        broken: told of every episode that cannot go on, which then counts up to there; if it
            raises, or is not given, the evaluation ends.

    Raises:
        UserError: the task's observations or actions are not those of the agent.
        TaskError: see `envs.make_env`.
        StepError: an episode cannot go on, and `broken` is not given; or none of them could be
            played to its end.
    """
    started = time.perf_counter()
    environments = [make_env(task, action_repeat) for _ in range(episodes)]
    check_sizes(model, environments[0], task)
    if disturbances is not None:
        environments = [disturb(env, **disturbances) for env in environments]
    faults: list[StepError] = []
    returns = np.zeros(episodes)

    def seen(i: int, observation: np.ndarray, info: dict[str, Any], terminated: bool) -> None:
        observations[i] = observation
        watch(i, observation if disturbances is None else info["observation"], terminated)

    observations: dict[int, np.ndarray] = {}
    running = []
    for i, env in enumerate(environments):
        try:
            seen(i, *env.reset(seed=seed + i), False)
            running.append(i)
        except StepError as error:
            broken(error)
            faults.append(error)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    means = first_means(config.planner, len(running), model.widths.action, device)
    decisions = 0
    while running and not interrupted():
        inputs = torch.from_numpy(np.stack([observations[i] for i in running])).to(device)
        noise = draw_noise(config.planner, len(running), model.widths.action, generator)
        decision = plan(model, inputs, means, noise, config.planner, config.learning.discount)
        means = decision.means
        decisions += len(running)
        ended = []
        for place, action in enumerate(decision.actions.cpu().numpy()):
            i = running[place]
            try:
                observation, reward, terminated, truncated, info = environments[i].step(action)
            except StepError as error:
                broken(error)
                faults.append(error)
                ended.append(place)
                continue
            seen(i, observation, info, terminated)
            returns[i] += reward
            if terminated or truncated:
                ended.append(place)
        if ended:
            still = [place for place in range(len(running)) if place not in ended]
            running = [running[place] for place in still]
            means = means[:, still]
    for env in environments:
        env.close()
    if running:
        return None
    if len(faults) == episodes:
        raise faults[-1]
    return Evaluation(returns.tolist(), decisions, time.perf_counter() - started)


def check_sizes(model: WorldModel, env: gymnasium.Env, task: str) -> None:
    """Refuse a task that is not of the agent's sizes, such as one that was changed since.

    Raises:
        UserError: it is not, and what they are.
    """
    widths = model.widths
    theirs = env.observation_space.shape[0], env.action_space.shape[0]
    if theirs != (widths.observation, widths.action):
        raise UserError(
            f"the agent takes {widths.observation} observations and gives {widths.action} actions, "
            f"but task '{task}' has {theirs[0]} and {theirs[1]}"
        )


def agent_size(model: WorldModel, config: AgentConfig) -> dict[str, float]:
    """Sparsity (fraction of the dense parameters that is gone), parameters, and planning MACs."""
    widths = model.widths
    with torch.device("meta"):
        dense = WorldModel(Widths.dense(config.network, widths.observation, widths.action))
    parameters, dense_parameters = (
        sum(parameter.numel() for parameter in each.parameters()) for each in (model, dense)
    )
    return {
        "sparsity": 1 - parameters / dense_parameters,
        "parameters": parameters,
        "macs": planning_macs(model, config.planner),
    }


class ObservationError(UserError):
    """An observation that no action can follow from, and what is wrong with it."""


class Controller:
    """An agent in control of one environment: observation in, action out."""

    def __init__(
        self,
        model: WorldModel,
        config: AgentConfig,
        seed: int = 0,
        layout: Sequence[Mapping[str, Any]] = (),
    ):
        """Take control.

        Args:
            model: the agent's networks; they stay on their device.
            config: its planner and discount are used.
            seed: of the planner's noise.
            layout: `envs.observation_layout`, so that errors name the parts of an observation.
        """
        self._model, self._config = model, config
        self._device = next(model.parameters()).device
        self._action_width = model.widths.action
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


def decision_milliseconds(
    *agents: tuple[WorldModel, AgentConfig], repeats: int = 5
) -> list[list[float]]:
    """Times of single decisions of each agent by `clock`, in milliseconds, `repeats` for each.

    The agents decide in turn, so that whatever else the machine does meets all alike; the first
    decision of each is not counted.
    """
    controllers = [Controller(*agent) for agent in agents]
    observations = [np.zeros(model.widths.observation, np.float32) for model, _ in agents]
    clocks = [clock(next(model.parameters()).device) for model, _ in agents]
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
