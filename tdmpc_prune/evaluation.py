"""How good an agent is, and how big and how fast: returns over whole episodes, and figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from envs import disturb, make_env
from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.planner import draw_noise, first_means, plan, planning_macs
from tdmpc_prune.agent.world_model import Widths, WorldModel


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
    """
    started = time.perf_counter()
    environments = [make_env(task, action_repeat) for _ in range(episodes)]
    if disturbances is not None:
        environments = [disturb(env, **disturbances) for env in environments]
    observations = []
    for i, env in enumerate(environments):
        observation, info = env.reset(seed=seed + i)
        observations.append(observation)
        watch(i, info.get("observation", observation), False)
    action_width = environments[0].action_space.shape[0]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    means = first_means(config.planner, episodes, action_width, device)
    returns = np.zeros(episodes)
    running = list(range(episodes))
    decisions = 0
    while running and not interrupted():
        inputs = torch.from_numpy(np.stack([observations[i] for i in running])).to(device)
        noise = draw_noise(config.planner, len(running), action_width, generator)
        decision = plan(model, inputs, means, noise, config.planner, config.learning.discount)
        means = decision.means
        decisions += len(running)
        ended = []
        for place, action in enumerate(decision.actions.cpu().numpy()):
            i = running[place]
            observations[i], reward, terminated, truncated, info = environments[i].step(action)
            watch(i, info.get("observation", observations[i]), bool(terminated))
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
    return Evaluation(returns.tolist(), decisions, time.perf_counter() - started)


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


class Controller:
    """An agent in control of one environment: observation in, action out."""

    def __init__(self, model: WorldModel, config: AgentConfig, seed: int = 0):
        """Take control.

        Args:
            model: the agent's networks; they stay on their device.
            config: its planner and discount are used.
            seed: of the planner's noise.
        """
        self._model, self._config = model, config
        self._device = next(model.parameters()).device
        self._action_width = model.widths.action
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """A new episode begins."""
        planner = self._config.planner
        self._means = first_means(planner, 1, self._action_width, self._device)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Observation float32 `[O]` → action float32 `[A]` in [-1, 1]."""
        planner, discount = self._config.planner, self._config.learning.discount
        noise = draw_noise(planner, 1, self._action_width, self._generator)
        inputs = torch.from_numpy(observation).to(self._device).unsqueeze(0)
        decision = plan(self._model, inputs, self._means, noise, planner, discount)
        self._means = decision.means
        return decision.actions[0].cpu().numpy()


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
