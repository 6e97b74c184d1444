"""Pruning a TD-MPC agent: all that it computes with its networks, and its course of cuts."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from envs import make_env
from envs.tasks import default_action_repeat
from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.learner import Learner, model_loss, move_target, policy_loss
from tdmpc_prune.agent.planner import PlannerNoise, draw_noise, first_means, plan
from tdmpc_prune.agent.replay import Batch
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.checkpoint import load_agent
from tdmpc_prune.components import component_parameters
from tdmpc_prune.config import GroupsConfig, TrainConfig
from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.course import Course
from tdmpc_prune.pruning.groups import Structure, find_groups
from tdmpc_prune.pruning.tracing import Computation


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


def agent_groups(config: GroupsConfig) -> Structure:
    """The groups of a saved agent, or of a dense one for a task."""
    if config.checkpoint:
        saved = load_agent(config.checkpoint)
        model, agent = saved.model, saved.config
    else:
        env, agent = make_env(config.task), config.model
        widths = Widths.dense(
            agent.network, env.observation_space.shape[0], env.action_space.shape[0]
        )
        env.close()
        model = WorldModel(widths)
    return find_groups(agent_computation(model, copy.deepcopy(model), agent))


def agent_course(config: TrainConfig, first: int, learner: Learner) -> Course:
    """The course of pruning for a run.

    Args:
        config: of the run.
        first: env steps at which the run starts.
        learner: to be pruned; a new one is dense.

    Raises:
        UserError: the schedule does not fit the run, or there is no such plan.
    """
    widths, network = learner.model.widths, config.model.network
    dense = WorldModel(Widths.dense(network, widths.observation, widths.action))
    return Course(
        config.prune,
        learner,
        lambda learner: agent_computation(learner.model, learner.target, config.model),
        {
            name: sum(parameter.numel() for parameter in own)
            for name, own in component_parameters(dense).items()
        },
        (first, config.env_steps),
        "env_steps",
        "return",
        config.seed,
        gather=bool(config.start_from),
    )


def check(course: Course, config: TrainConfig) -> None:
    """Refuse, before anything is done, a course that could not be carried out.

    Raises:
        UserError: see `Course.check`; or a cut is due before there is any gradient to rank by.
    """
    repeat = config.action_repeat or default_action_repeat(config.task)
    first_update = config.model.learning.seed_decisions * repeat
    if course.stage.phase == "waiting" and course.schedule.time_of(1) <= first_update:
        raise UserError(
            f"the first cut is due at {course.schedule.time_of(1):.0f} env steps, but nothing is "
            f"learnt before {first_update} (model.learning.seed_decisions): raise prune.start or "
            f"env_steps"
        )
    course.check()
