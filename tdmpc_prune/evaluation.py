"""How good an agent is: returns over whole episodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch

from tdmpc_prune.agent.agent import Agent, Interface
from tdmpc_prune.agent.deciding import Deciding, choose, deciding
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
_KNOWN = 0.01  # share of a mean: standard error below which it is known


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns of some episodes."""

    returns: list[float]  # one per episode
    decisions: int  # planner decisions, over all episodes
    seconds: float  # wall time
    mean_change: float | None = None  # of an actuator's action from one decision to the next, in
    largest_change: float | None = None  # [-1, 1], over all actuators; None: it was not watched
    known: bool = False  # it ended before its last episode, because its mean was known

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
        return replace(
            self, returns=self.returns[:episodes], known=self.known and len(self) <= episodes
        )


def is_known(returns: Sequence[float]) -> bool:
    """Whether the standard error of a mean is below 1 % of it; never where all returns are 0."""
    if len(returns) < 2:
        return False
    error = float(np.std(returns, ddof=1)) / len(returns) ** 0.5
    return error < _KNOWN * abs(float(np.mean(returns)))


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
    least: int | None = None,
) -> Evaluation | None:
    """Play `episodes` whole episodes without exploration.

    Episode i starts from the environment's seed `seed + i`, so that agents that are compared with
    the same seed face the same initial states. PyTorch plans all episodes together; the planner in
    C, which gains nothing by that, plays one after another in one environment.

    Args:
        agent: plays its own task; its networks stay on their device.
        episodes: how many.
        seed: of initial states and planner noise.
        interrupted: asked before every decision; when true the evaluation ends with None.
        on_decision: told of every decision, which is one of all episodes that are played together.
        watch: told of every observation `[O]` of every episode, as it is without noise, and
            whether the episode terminated there (a time limit does not count).
        disturbances: arguments of `envs.disturb`; None leaves the task as it is.
        broken: told of every episode that cannot go on, which then counts up to there; if it
            raises, or is not given, the evaluation ends.
        decisions: "auto", "native" or "torch": who decides, see `deciding.choose`.
        least: where episodes are played one after another, and none of them was broken off: so
            many, then only as long as their mean is not known (see `is_known`). None plays all.

    Raises:
        UserError: the task's observations or actions are not those of the agent.
        TaskError: see `envs.make_env`.
        StepError: an episode cannot go on, and `broken` is not given; or none of them could be
            played to its end.
    """
    started = time.perf_counter()
    path = choose(decisions, agent.model.widths, agent.device).path
    together = 1 if path == "native" else episodes
    environments = [make_env(agent.task, agent.action_repeat) for _ in range(together)]
    check_sizes(agent.model, environments[0], agent.task)
    if disturbances is not None:
        environments = [disturb(env, **disturbances) for env in environments]

    def seen(i: int, observation: np.ndarray, info: Mapping[str, Any], terminated: bool) -> None:
        watch(i, observation if disturbances is None else info["observation"], terminated)

    planner = deciding(path, agent.model, agent.config, seed)
    game = _Game(agent, planner, seed, interrupted, on_decision, seen, broken)
    known = False
    try:
        for first in range(0, episodes, together):
            if not game.play(environments, first):
                return None
            if least is not None and least <= len(game.returns) < episodes and not game.faults:
                known = is_known(game.returns)
            if known:
                break
    finally:
        for env in environments:
            env.close()
    if len(game.faults) == len(game.returns):
        raise game.faults[-1]
    seconds = time.perf_counter() - started
    changes = game.changes
    change = (float(np.mean(changes)), float(np.max(changes))) if changes else (None, None)
    return Evaluation(game.returns, game.decisions, seconds, *change, known)


class _Game:
    """Plays an agent's episodes and keeps the books of them; arguments as of `evaluate`."""

    def __init__(
        self,
        agent: Agent,
        planner: Deciding,
        seed: int,
        interrupted: Callable[[], bool],
        on_decision: Callable[[], None],
        seen: Callable[[int, np.ndarray, Mapping[str, Any], bool], None],
        broken: Callable[[StepError], None],
    ):
        self._agent, self._planner, self._seed = agent, planner, seed
        self._interrupted, self._on_decision = interrupted, on_decision
        self._seen, self._broken = seen, broken
        self.returns: list[float] = []  # of the episodes that were begun
        self.faults: list[StepError] = []
        self.changes: list[np.ndarray] = []  # [A] from one action to the next
        self.decisions = 0

    def play(self, environments: Sequence[gymnasium.Env], first: int) -> bool:
        """Play an episode in each environment, together; False if it was interrupted.

        Args:
            environments: they are reset.
            first: the number of the first one's episode; the others' follow.
        """
        self.returns += [0.0] * len(environments)
        observations: dict[int, np.ndarray] = {}
        for i, env in enumerate(environments, first):
            with self._noted():
                observation, info = env.reset(seed=self._seed + i)
                self._seen(i, observation, info, False)
                observations[i] = observation
        running, latest = list(observations), {}  # the action of each episode
        device, actions = self._agent.device, self._agent.model.widths.action
        means = first_means(self._agent.config.planner, len(running), actions, device)
        number = 0
        while running:
            if self._interrupted():
                return False
            inputs = torch.from_numpy(np.stack([observations[i] for i in running])).to(device)
            decision = self._planner.decide(inputs, means, running, number)
            number += 1
            self.decisions += len(running)
            self._on_decision()
            going = []  # places of the episodes that go on
            for place, action in enumerate(decision.actions.cpu().numpy()):
                i = running[place]
                if i in latest:
                    self.changes.append(np.abs(action - latest[i]))
                latest[i] = action
                with self._noted():
                    step = environments[i - first].step(action)
                    observations[i], reward, terminated, truncated, info = step
                    self._seen(i, observations[i], info, terminated)
                    self.returns[i] += reward
                    if not (terminated or truncated):
                        going.append(place)
            means = decision.means
            if len(going) < len(running):
                running, means = [running[place] for place in going], means[:, going]
        return True

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Note what breaks an episode off."""
        try:
            yield
        except StepError as error:
            self._broken(error)
            self.faults.append(error)


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
