"""Pruning a TD-MPC agent: all that it computes with its networks, and its course of cuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.learner import model_loss, move_target, policy_loss
from tdmpc_prune.agent.planner import PlannerNoise, draw_noise, first_means, plan
from tdmpc_prune.agent.replay import Batch
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.prunable import Computation


def agent_computation(model: WorldModel, target: WorldModel, config: AgentConfig) -> Computation:
    """All that an agent does with its networks: both losses, the targets' average, the planner."""
    learning = config.learning
    observation, action = model.widths.observation, model.widths.action
    steps, size = learning.horizon, 2

    def meta(*shape: int) -> Tensor:
        return torch.zeros(shape, device="meta")

    def update(networks: dict[str, nn.Module]) -> tuple:
        model, target = networks["model"], networks["target"]
        batch = Batch(
            observation=meta(size, observation),
            actions=meta(steps, size, action),
            rewards=meta(steps, size),
            next_observations=meta(steps, size, observation),
            terminated=meta(steps, size),
            valid=meta(steps, size),
            weights=meta(size),
        )
        losses = model_loss(model, target, batch, meta(steps, size, action), learning)
        # The latents are not an output: the policy's loss takes them up.
        valid, noise = meta(steps + 1, size), meta(steps + 1, size, action)
        improved = policy_loss(model, losses.latents, valid, noise, learning)
        move_target(target, model, learning.target_rate)
        return losses.total, improved, losses.priorities

    def decide(networks: dict[str, nn.Module]) -> Tensor:
        planner = config.planner
        drawn = draw_noise(planner, 1, action, torch.Generator())
        noise = PlannerNoise(**{name: part.to("meta") for name, part in vars(drawn).items()})
        means = first_means(planner, 1, action, "meta")
        model = networks["model"]
        return plan(model, meta(1, observation), means, noise, planner, learning.discount).actions

    return Computation({"model": model, "target": target}, update, decide)
