"""How good an agent is: returns over whole episodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch

from tdmpc_prune.agent.agent import Agent, Interface
from tdmpc_prune.agent.deciding import choose, deciding
from tdmpc_prune.agent.planner import first_means
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.envs import (
    StepError,
    action_limits,
    disturb,
    make_env,
    observation_layout,
    simulator_step_seconds,
)
from tdmpc_prune.errors import UserError

EVALUATION_SEED = 1_000_000  # the initial states of evaluations are the same in every run


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns of some episodes."""

    returns: list[float]  # one per episode
    decisions: int  # planner decisions, over all episodes
    seconds: float  # wall time
    mean_change: float | None = None  # of an actuator's action from one decision to the next, in
    largest_change: float | None = None  # [-1, 1], over all actuators; None: it was not watched

    def __len__(self) -> int:
        """How many episodes they were."""
        return len(self.returns)

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
    agent: Agent,
    episodes: int,
    seed: int,
    interrupted: Callable[[], bool] = lambda: False,
    on_decision: Callable[[], None] = lambda: None,
    watch: Callable[[int, np.ndarray, bool], None] = lambda episode, observation, terminated: None,
    disturbances: Mapping[str, Any] | None = None,
    broken: Callable[[StepError], None] = _refuse,
    decisions: str = "torch",
) -> Evaluation | None:
    """Play `episodes` whole episodes without exploration.

    Episode i starts from the environment's seed `seed + i`, so that agents that are compared with
    the same seed face the same initial states.

    Args:
        agent: plays its own task; its networks stay on their device.
        episodes: how many, all planned together.
        seed: of initial states and planner noise.
        interrupted: asked before every decision; when true the evaluation ends with None.
        on_decision: told of every decision, which is one of all episodes that still run.
        watch: told of every observation `[O]` of every episode, as it is without noise, and
            whether the episode terminated there (a time limit does not count).
        disturbances: arguments of `envs.disturb`; None leaves the task as it is.
        broken: told of every episode that cannot go on, which then counts up to there; if it
            raises, or is not given, the evaluation ends.
        decisions: "auto", "native" or "torch": who decides, see `deciding.choose`.

    Raises:
        UserError: the task's observations or actions are not those of the agent.
        TaskError: see `envs.make_env`.
        StepError: an episode cannot go on, and `broken` is not given; or none of them could be
            played to its end.
    """
    started = time.perf_counter()
    model, config = agent.model, agent.config
    environments = [make_env(agent.task, agent.action_repeat) for _ in range(episodes)]
    check_sizes(model, environments[0], agent.task)
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
    device, actions = agent.device, model.widths.action
    path = choose(decisions, model.widths, device).path
    planner = deciding(path, model, config, seed)
    means = first_means(config.planner, len(running), actions, device)
    made = number = 0
    latest: dict[int, np.ndarray] = {}  # action of each episode
    changes: list[np.ndarray] = []
    while running and not interrupted():
        inputs = torch.from_numpy(np.stack([observations[i] for i in running])).to(device)
        decision = planner.decide(inputs, means, running, number)
        means = decision.means
        number += 1
        made += len(running)
        on_decision()
        ended = []
        for place, action in enumerate(decision.actions.cpu().numpy()):
            i = running[place]
            if i in latest:
                changes.append(np.abs(action - latest[i]))
            latest[i] = action
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
    seconds = time.perf_counter() - started
    change = (float(np.mean(changes)), float(np.max(changes))) if changes else (None, None)
    return Evaluation(returns.tolist(), made, seconds, *change)


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


def interface_of(env: gymnasium.Env, action_repeat: int) -> Interface:
    """What the numbers of a task mean, for an agent that goes without it.

    Args:
        env: of `envs.make_env`.
        action_repeat: simulator steps per decision.
    """
    low, high = (tuple(map(float, limit)) for limit in action_limits(env))
    seconds = simulator_step_seconds(env)
    return Interface(
        observation=tuple((part["name"], part["size"]) for part in observation_layout(env)),
        low=low,
        high=high,
        control_period=seconds * action_repeat if seconds else None,
    )
