"""Pruning a finished agent: the same run as training, started from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tdmpc_prune import pruning_steps, runs
from tdmpc_prune.checkpoint import load_agent
from tdmpc_prune.compression import check
from tdmpc_prune.config import PruneCheckpointConfig, TrainConfig
from tdmpc_prune.errors import RunError
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.training import Trainer


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
        eval_every=config.eval_every,
        eval_episodes=config.eval_episodes,
        run_dir=config.run_dir,
        start_from=str(config.checkpoint),
    )


def start(config: PruneCheckpointConfig, command: list[str]) -> Trainer:
    """A new run that prunes the agent. Raises UserError: see `runs.start`."""
    return runs.start(training_config(config), command)


def explain(config: PruneCheckpointConfig) -> Plan:
    """The plan of one cut to the final sparsity, written to the file `config.explain`.

    Raises:
        UserError: see `runs.start`.
        RunError: the file cannot be written.
    """
    trainer = Trainer(training_config(config), Path(config.run_dir or "."))
    check(trainer.course, trainer.config)
    pruning_steps.gather_all(trainer, trainer.config.env_steps)
    plan = trainer.course.plan_at(1.0, config.prune.sparsity)
    try:
        plan.save(Path(config.explain))
    except OSError as error:
        raise RunError(f"explain={config.explain} cannot be written: {error.strerror}") from error
    return plan


def gathered_densities(trainer: Trainer) -> np.ndarray:
    """`[U]` importance per parameter of every unit of a finished agent."""
    pruning_steps.gather_all(trainer, trainer.config.env_steps)
    return trainer.course.densities(1.0)
