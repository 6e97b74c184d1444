"""Starting a run, going on with one, and what is printed at its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tdmpc_prune.errors import UserError
from tdmpc_prune.saving.agents import dense_parent, save_agent
from tdmpc_prune.saving.run_folder import checkpoint_dir, create_run, read_command, read_run
from tdmpc_prune.settings import from_plain, to_plain, typed
from tdmpc_prune.training import report as pruning_report
from tdmpc_prune.training.agent import Trainer
from tdmpc_prune.training.agent_course import check
from tdmpc_prune.training.config import TrainConfig
from tdmpc_prune.training.run import parent_dir
from tdmpc_prune.words import counted, mean_and_std

_MAY_CHANGE_ON_RESUME = {"resume", "env_steps", "device", "threads"}


def default_run_dir(config: TrainConfig) -> Path:
    """Where a run goes that was given no folder."""
    task = config.task.replace(":", "-").replace("/", "-")
    arm = f"{config.prune.method}{'-of-finished' if config.start_from else ''}"
    return Path("runs") / task / arm / f"seed{config.seed}"


def start(config: TrainConfig, command: list[str]) -> Trainer:
    """A new run, from scratch or from a checkpoint.

    Raises:
        UserError: its folder already holds one, or its pruning cannot be carried out.
        TaskError: see `envs.make_env`; or the task cannot be played.
    """
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    trainer = Trainer(config, run_dir)
    if trainer.course:
        check(trainer.course, config)
    trainer.rehearse()
    create_run(run_dir, to_plain(config), command)
    return _begun(trainer)


def resume(config: TrainConfig, given: list[str]) -> Trainer:
    """A run that goes on from its newest checkpoint.

    Args:
        config: `resume` names the run's folder.
        given: the settings given on the command line; few may change.

    Raises:
        UserError: there is no such run, it is damaged, or a setting may not change.
    """
    run_dir = Path(config.resume)
    settings = read_run(run_dir)
    if "task" not in settings:
        own = typed("train_autoencoder.py", resume=run_dir)
        raise UserError(f"'{run_dir}' is the run of an autoencoder; go on with: {own}")
    saved = from_plain(TrainConfig, settings)
    for name in given:
        if name not in _MAY_CHANGE_ON_RESUME:
            raise UserError(
                f"{name} cannot change when a run is resumed; only "
                f"{', '.join(sorted(_MAY_CHANGE_ON_RESUME - {'resume'}))} can"
            )
    changed = {name: getattr(config, name) for name in given if name != "resume"}
    if not any((run_dir / "checkpoints").glob("[0-9]*-[0-9]*")):
        # It was killed before its first checkpoint.
        return _begun(Trainer(replace(saved, **changed), run_dir))
    # Its own checkpoint holds what it was started with.
    own = {"start_from": None, "prune": replace(saved.prune, plan=None)}
    trainer = Trainer(replace(saved, **changed, **own), run_dir)
    trainer.load(checkpoint_dir(run_dir))
    return trainer


def _begun(trainer: Trainer) -> Trainer:
    """Note where the run's agent comes from: the command, and its dense parent's networks."""
    trainer.commands.append(read_command(trainer.run_dir))
    config, kept = trainer.config, parent_dir(trainer.run_dir)
    parent = dense_parent(config.start_from) if config.start_from else None
    to_be_pruned = config.prune.method != "none" or not trainer.agent().is_dense
    if parent and to_be_pruned and not kept.exists():
        save_agent(kept, parent)
    return trainer


def finish(trainer: Trainer) -> None:
    """Run to the end and say what came of it. Raises: see `Trainer.run`."""
    began = trainer.progress.env_steps, trainer.progress.history, trainer.learner.updates
    evaluation = trainer.run()
    ended = trainer.progress.env_steps, trainer.log.history, trainer.learner.updates
    if began == ended:
        done = trainer.progress.env_steps
        longer = typed("train.py", resume=trainer.run_dir, env_steps=2 * done)
        print(f"the run is finished: it has its {done} env steps; make it longer with: {longer}")
    pruned = ""
    if trainer.course:
        pruned = (
            f"{pruning_report.reached(trainer.course, trainer.now)}\n"
            f"what each cut did   {trainer.run_dir / 'course.png'}\n"
        )
    broken = trainer.progress.broken_episodes
    if broken:
        pruned += f"episodes broken off   {broken}, and why is in history.jsonl\n"
    print(
        f"return {mean_and_std(evaluation.returns)} over "
        f"{counted(len(evaluation.returns), 'episode')} after "
        f"{trainer.progress.env_steps:,} env steps\n"
        f"{pruning_report.times_table(trainer.times)}\n"
        f"{pruned}"
        f"everything is in   {trainer.run_dir}\n"
        f"evaluate it with   {typed('evaluate.py', checkpoint=trainer.run_dir)}\n"
        f"compare runs with  tensorboard --logdir runs"
    )
