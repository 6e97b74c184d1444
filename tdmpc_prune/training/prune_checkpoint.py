"""Pruning a finished agent or autoencoder: the same run as training, from its checkpoint on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.world_model import Widths
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.surgery import commit
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.training import autoencoder as autoencoder_training
from tdmpc_prune.training import launch as runs
from tdmpc_prune.training import run as pruning_steps
from tdmpc_prune.training.agent import Trainer
from tdmpc_prune.training.agent_course import check
from tdmpc_prune.training.autoencoder import AutoencoderTrainer
from tdmpc_prune.training.config import AutoencoderConfig, PruneCheckpointConfig, TrainConfig

_OF_AGENTS = {
    *("env_steps", "device", "eval_episodes"),
    *("prune.eval_episodes", "prune.gather_episodes"),
}
_OF_AUTOENCODERS = {"updates"}


def training_config(config: PruneCheckpointConfig) -> TrainConfig:
    """The run that takes the agent from its checkpoint to the end of its recovery."""
    agent = load_agent(config.checkpoint)
    return TrainConfig(
        task=agent.task,
        prune=config.prune,
        model=agent.config,
        seed=config.seed,
        env_steps=agent.provenance["env_steps"] + config.env_steps,
        device=config.device,
        threads=config.threads,
        action_repeat=agent.action_repeat,
        eval_every=config.eval_every or 5_000,
        eval_episodes=config.eval_episodes,
        run_dir=config.run_dir,
        start_from=str(config.checkpoint),
    )


def autoencoder_config(config: PruneCheckpointConfig, given: list[str]) -> AutoencoderConfig:
    """The run that takes the autoencoder from its checkpoint to the end of its recovery.

    Its widths are small beside an agent's, and so are its floors unless they are `given`.
    """
    floors = AutoencoderConfig().prune
    own = {n: getattr(floors, n) for n in ("min_width", "round_to") if f"prune.{n}" not in given}
    saved = autoencoder_training.saved_config(config.checkpoint)
    done = autoencoder_training.updates_of(config.checkpoint)
    return replace(
        saved,
        prune=replace(config.prune, **own),
        seed=config.seed,
        updates=done + config.updates,
        eval_every=config.eval_every or 500,
        threads=config.threads,
        run_dir=config.run_dir,
        start_from=str(config.checkpoint),
        resume=None,
    )


def run(config: PruneCheckpointConfig, given: list[str], command: list[str]) -> None:
    """Prune in a new run, and say what came of it.

    Args:
        config: all settings.
        given: the names of those on the command line.
        command: the command line.

    Raises:
        UserError: see `runs.start`; or a setting is for the other kind of network.
    """
    if _is_autoencoder(config, given):
        trainer = autoencoder_training.start(autoencoder_config(config, given), command)
        autoencoder_training.finish(trainer)
    else:
        runs.finish(start(config, command))


def start(config: PruneCheckpointConfig, command: list[str]) -> Trainer:
    """A new run that prunes the agent. Raises UserError: see `runs.start`."""
    return runs.start(training_config(config), command)


def widths_after(config: PruneCheckpointConfig) -> Widths:
    """An agent's widths after one cut to the final sparsity. Raises UserError: no such plan."""
    trainer = Trainer(training_config(config), Path("."))
    check(trainer.course, trainer.config)
    pruning_steps.gather_all(trainer)
    plan, learner = trainer.course.plan_at(1.0, config.prune.sparsity), trainer.learner
    computation = agent_computation(learner.model, learner.target, trainer.config.model)
    commit(plan, trainer.course.structure, computation)
    return learner.model.widths


def _is_autoencoder(config: PruneCheckpointConfig, given: list[str]) -> bool:
    """What kind of network it is. Raises UserError: a given setting is for the other kind."""
    autoencoder = autoencoder_training.is_autoencoder(config.checkpoint)
    kind, foreign = ("an agent", _OF_AUTOENCODERS)
    if autoencoder:
        kind, foreign = ("an autoencoder", _OF_AGENTS)
    if wrong := sorted(foreign & set(given)):
        raise UserError(f"{wrong[0]} is not for '{config.checkpoint}', which is {kind}")
    return autoencoder


def explain(config: PruneCheckpointConfig, given: list[str]) -> Plan:
    """The plan of one cut to the final sparsity, written to the file `config.explain`.

    Raises:
        UserError: see `runs.start`.
        RunError: the file cannot be written.
    """
    folder = Path(config.run_dir or ".")
    if _is_autoencoder(config, given):
        trainer = AutoencoderTrainer(autoencoder_config(config, given), folder)
        trainer.course.check()
    else:
        trainer = Trainer(training_config(config), folder)
        check(trainer.course, trainer.config)
    pruning_steps.gather_all(trainer)
    plan = trainer.course.plan_at(1.0, config.prune.sparsity)
    try:
        plan.save(Path(config.explain))
    except OSError as error:
        raise RunError(f"explain={config.explain} cannot be written: {error.strerror}") from error
    return plan
