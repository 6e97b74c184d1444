"""How good an agent is: its return over whole episodes, planned all at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from envs import make_env
from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.planner import draw_noise, first_means, plan
from tdmpc_prune.agent.world_model import WorldModel


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


def evaluate(
    model: WorldModel,
    config: AgentConfig,
    task: str,
    action_repeat: int | None,
    episodes: int,
    seed: int,
    interrupted: Callable[[], bool] = lambda: False,
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
    """
    started = time.perf_counter()
    environments = [make_env(task, action_repeat) for _ in range(episodes)]
    observations = [env.reset(seed=seed + i)[0] for i, env in enumerate(environments)]
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
            observations[i], reward, terminated, truncated, _ = environments[i].step(action)
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


def decision_milliseconds(model: WorldModel, config: AgentConfig, repeats: int = 5) -> float:
    """Wall time of one decision in one environment: the median of `repeats`, in milliseconds."""
    widths, device = model.widths, next(model.parameters()).device
    noise = draw_noise(config.planner, 1, widths.action, torch.Generator(device).manual_seed(0))
    observation = torch.zeros(1, widths.observation, device=device)
    means = first_means(config.planner, 1, widths.action, device)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        decision = plan(model, observation, means, noise, config.planner, config.learning.discount)
        decision.actions.cpu()  # waits for a GPU
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times))
