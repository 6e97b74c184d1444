"""A small agent with random weights that is taught offline by a whole one (ours).

Its latent is those channels of the teacher's, rotated, that carry most; its last layers are fitted
to the teacher in closed form, and then all of it is distilled, on scores too, in one go: nothing
measures a return on the way, as for a cut in its rounds. Where a cut of the same size does much
better, it is the teacher's trained units that count; where it does not, the teaching is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.calibration import last_layers, latent_channels
from tdmpc_prune.agent.distillation import Teacher, distil
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import EVALUATION_SEED, Evaluation, evaluate
from tdmpc_prune.pruning.allocation import make_plan
from tdmpc_prune.pruning.config import ONE_CUT, PruneConfig
from tdmpc_prune.pruning.gains import Gains, rank_by_data
from tdmpc_prune.pruning.plan import Plan, plan_of
from tdmpc_prune.pruning.refit import kept_channels, refit
from tdmpc_prune.pruning.structure import Structure
from tdmpc_prune.pruning.surgery import commit
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.training.config import DistilConfig, PruneCheckpointConfig
from tdmpc_prune.training.launch import prepare, pruning_run
from tdmpc_prune.training.run import Run
from tdmpc_prune.words import counted, folder_name, mean_and_std

_SEED = 1_000  # added to the seed of a student's weights: not those that its teacher began with


@dataclass(frozen=True)
class Taught:
    """A student, and what teaching it brought."""

    agent: Agent
    teacher: Evaluation
    fitted: Evaluation  # of the student with its last layers fitted
    distilled: Evaluation

    def sentence(self) -> str:
        """What came of it."""
        size, steps = self.agent.size(), self.agent.provenance["pruning"]["offline_steps"]
        before, fitted, distilled = (
            mean_and_std(each.returns) for each in (self.teacher, self.fitted, self.distilled)
        )
        return (
            f"the student has {size['parameters']:,} parameters (sparsity {size['sparsity']:.3f}) "
            f"and {size['macs']:,} MACs per decision\n"
            f"return over {counted(len(self.distilled), 'episode')}: teacher {before}, student "
            f"{fitted} with its last layers fitted, {distilled} after {steps} offline steps"
        )


def folder_of(config: DistilConfig) -> Path:
    """Where the student goes. Raises UserError: there is no teacher."""
    task = folder_name(_teacher(config).task)
    return Path(config.save or f"runs/{task}/student/seed{config.seed}")


def teach(config: DistilConfig, command: str) -> Taught:
    """Make a small student of a dense agent; no environment step but those of its data.

    Args:
        config: teacher, size and steps.
        command: as it was typed, for the student's provenance.

    Raises:
        UserError: the agent is pruned and its dense parent is not there; the student would be
            larger than its teacher; there is no data.
        NonFiniteLoss: see `distil`.
    """
    teacher = _teacher(config)
    student, whole, plan = fit(config, teacher)

    def measured(model: WorldModel) -> Evaluation:
        return evaluate(replace(teacher, model=model), config.eval_episodes, EVALUATION_SEED)

    before = measured(whole.model)
    fitted = measured(student)
    distil(student, whole, config.steps, seed=config.seed)
    distilled = measured(student)
    said = {
        "method": "student",
        "refit": True,
        "offline_steps": config.steps,
        "cuts": 1,
        "dense_score": before.mean,
        "dense_parameters": plan.dense_parameters,
        "asked_sparsity": plan.sparsity,
        "undone": 0,
        "reference": before.mean,
        "shortfall": None,
    }
    agent = replace(
        teacher,
        model=student,
        parent=teacher.folder,
        provenance=teacher.provenance
        | {
            "returns": distilled.returns,
            "commands": [*teacher.provenance.get("commands", []), command],
        },
    )
    agent.provenance["pruning"] = said | agent.size()
    return Taught(agent, before, fitted, distilled)


def fit(config: DistilConfig, teacher: Agent) -> tuple[WorldModel, Teacher, Plan]:
    """A student with random weights whose last layers are fitted, before it is distilled.

    Returns:
        The student; its teacher, in the basis that its latent is of; and its widths, as what goes
        from the teacher's.

    Raises:
        UserError: see `teach`.
    """
    run = _gathered(config, teacher)
    trainee, structure = run.trainee, run.pruner.structure
    calibration = trainee.calibration()
    gains = rank_by_data(structure, trainee.computation(), calibration)
    plan = _plan(config, structure, gains, run.pruner.facts.dense)
    whole = WorldModel(trainee.model.widths)
    whole.load_state_dict(gains.weights.get("model", trainee.model.state_dict()))
    commit(plan, structure, trainee.computation())
    student = trainee.draw(trainee.model.widths, config.seed + _SEED)
    whole.to(trainee.device)
    refit(
        plan,
        structure,
        whole,
        {"model": student},
        calibration.only(last_layers(whole).__contains__),
    )
    channels = latent_channels(kept_channels(plan, structure, whole), whole)
    pool, path = partial(trainee.pool, whole), trainee.choice.path
    return student, Teacher(whole, pool, channels, teacher.config, path), plan


def _teacher(config: DistilConfig) -> Agent:
    agent = load_agent(config.checkpoint)
    if agent.is_dense:
        return agent
    if agent.parent is None:
        raise UserError(
            f"'{config.checkpoint}' is pruned and its dense parent is not there: a student learns "
            f"from a dense agent, give checkpoint=<its folder>"
        )
    return load_agent(agent.parent)


def _gathered(config: DistilConfig, teacher: Agent) -> Run:
    """The teacher with its replay buffer, or with one that episodes were played for."""
    prune = replace(ONE_CUT, compare=False, gather_episodes=config.gather_episodes)
    settings = PruneCheckpointConfig(
        str(teacher.folder), prune, seed=config.seed, device=config.device, threads=config.threads
    )
    run = prepare(pruning_run(settings, []))
    run.gather_all()
    return run


def _plan(
    config: DistilConfig, structure: Structure, gains: Gains, dense: Mapping[str, int]
) -> Plan:
    """The student's widths, as what goes from the teacher's."""
    order = {name: ranking.order for name, ranking in gains.ranking.items()}
    given = {
        "encoder": config.encoder_width,
        "latent": config.latent_width,
        "hidden": config.hidden_width,
    }
    if not any(given.values()):
        densities = {name: np.empty(width) for name, width in structure.widths.items()}
        for name, units in order.items():
            densities[name][units] = np.arange(len(units))
        even = PruneConfig("reconstruction", allocation="uniform", min_width=2, round_to=1)
        values = np.concatenate([densities[name] for name in structure.widths])
        return make_plan(structure, values, even, config.sparsity, dense)
    after = {}
    for group in structure.groups:
        part = "encoder" if group.home == "encoder" else "hidden"
        wanted = given["latent" if group.coupling else part] or group.width
        if wanted > group.width:
            raise UserError(
                f"the student would be larger than its teacher: '{group.name}' has {group.width} "
                f"units there, and {wanted} were asked for"
            )
        after[group.name] = wanted
    return plan_of(structure, order, after, ("reconstruction", "given"), 0.0, dense)
