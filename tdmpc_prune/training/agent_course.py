""

from __future__ import annotations

from envs.tasks import default_action_repeat
from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.learner import Learner
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import component_parameters
from tdmpc_prune.pruning.pruner import Course
from tdmpc_prune.training.config import TrainConfig


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
