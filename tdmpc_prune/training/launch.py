"""Starting a run, from scratch or from a checkpoint; going on with one; what is said at its end.

For either kind of network: the settings say which.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tdmpc_prune.agent.deciding import unavailable
from tdmpc_prune.agent.learner import unavailable as cannot_learn
from tdmpc_prune.agent.world_model import Widths
from tdmpc_prune.envs import make_env
from tdmpc_prune.envs import report as report_on
from tdmpc_prune.envs.tasks import FILE_PREFIX, GYM_PREFIX
from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.refit import Refit
from tdmpc_prune.pruning.surgery import commit
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.saving.autoencoders import is_autoencoder, load_autoencoder
from tdmpc_prune.saving.files import copy_networks, write_file
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.settings import from_plain, to_plain, typed
from tdmpc_prune.training import report
from tdmpc_prune.training.agent import AgentTraining
from tdmpc_prune.training.autoencoder import AutoencoderTraining
from tdmpc_prune.training.config import AutoencoderConfig, PruneCheckpointConfig, TrainConfig
from tdmpc_prune.training.report import words_of
from tdmpc_prune.training.run import Run

RunConfig = TrainConfig | AutoencoderConfig

_KINDS = {TrainConfig: ("an agent", "train.py")}
_KINDS |= {AutoencoderConfig: ("an autoencoder", "train_autoencoder.py")}
_OF_AGENTS = {  # settings of `PruneCheckpointConfig`
    *("env_steps", "device", "eval_episodes", "eval_least", "decisions"),
    *("prune.distil", "prune.eval_episodes", "prune.gather_episodes"),
}
_OF_AUTOENCODERS = {"updates"}


def default_run_dir(config: RunConfig) -> Path:
    """Where a run goes that was given no folder."""
    arm = f"{config.prune.method}{'-of-finished' if config.start_from else ''}"
    return Path("runs") / config.subject / arm / f"seed{config.seed}"


def start(config: RunConfig, command: list[str]) -> Run:
    """A new run, from scratch or from a checkpoint.

    Raises:
        UserError: its folder already holds one, or its pruning cannot be carried out.
        TaskError: see `envs.make_env`.
    """
    run = prepare(config)
    settings = to_plain(config)
    if isinstance(config, TrainConfig):
        settings["decisions"] = run.trainee.choice.path  # resumed by whoever began
    run.folder.create(settings, command)
    return _begun(run)


def assemble(config: RunConfig, folder: RunFolder | None = None) -> Run:
    """A run, or what it is made of for other uses; nothing is checked or written."""
    trainee = AgentTraining if isinstance(config, TrainConfig) else AutoencoderTraining
    folder = folder or RunFolder(config.run_dir or default_run_dir(config))
    return Run(trainee(config), folder)


def prepare(config: RunConfig) -> Run:
    """A run that can be carried out and has not begun; nothing is written.

    Raises:
        UserError: see `start`.
    """
    run = assemble(config)
    if run.pruner:
        run.pruner.check(run.trainee.first_update)
    run.trainee.rehearse()
    return run


def task_report(config: TrainConfig) -> str | None:
    """What an agent will see of a task that others wrote; None of the suite's, or of a resumed run.

    Raises:
        TaskError: see `envs.make_env`; StepError: it cannot be played.
    """
    if config.resume or not config.task.startswith((GYM_PREFIX, FILE_PREFIX)):
        return None
    env = make_env(config.task, config.action_repeat)
    try:
        return report_on(config.task, env, config.action_repeat or 1)
    finally:
        env.close()


def resume(config: RunConfig, given: list[str]) -> Run:
    """A run that goes on from its newest checkpoint.

    Args:
        config: `resume` names the run's folder.
        given: the settings given on the command line; few may change.

    Raises:
        UserError: there is no such run, it is damaged, another process is at work in it, or a
            setting may not change.
    """
    folder, kind = RunFolder(config.resume), type(config)
    settings = folder.settings()
    theirs = TrainConfig if "task" in settings else AutoencoderConfig
    if theirs is not kind:
        what, script = _KINDS[theirs]
        raise UserError(
            f"'{folder}' is the run of {what}; go on with: {typed(script, resume=folder)}"
        )
    if theirs is TrainConfig:
        settings.setdefault("decisions", "torch")  # older runs had no other
        settings.setdefault("eval_least", settings["eval_episodes"])  # and played all
        _check_decisions(folder, settings["decisions"])
    saved = from_plain(kind, settings)
    for name in given:
        if name != "resume" and name not in kind.MAY_CHANGE_ON_RESUME:
            *most, last = kind.MAY_CHANGE_ON_RESUME
            raise UserError(
                f"{name} cannot change when a run is resumed; only {', '.join(most)} and {last} can"
            )
    changed = {name: getattr(config, name) for name in given if name != "resume"}
    if not folder.checkpoints():  # it was killed before its first
        return _begun(assemble(replace(saved, **changed), folder))
    # Its own checkpoint holds what it was started with.
    own = {"start_from": None, "prune": replace(saved.prune, plan=None)}
    run = assemble(replace(saved, **changed, **own), folder)
    with folder.owned():  # who is at work in it replaces what is read here
        run.load()
    return run


def _check_decisions(folder: RunFolder, decisions: str) -> None:
    """Refuse to go on with a run whose decisions and updates cannot be made here."""
    because = (unavailable() or cannot_learn()) if decisions == "native" else None
    if because:
        raise UserError(
            f"'{folder}' was begun with decisions=native, and cannot go on exactly with another: "
            f"{because}"
        )


def _begun(run: Run) -> Run:
    """Note where the networks come from: the command, and their dense parent."""
    run.commands.append(run.folder.command())
    if run.config.start_from:
        saved = run.trainee.load(Path(run.config.start_from))
        dense = saved.folder if saved.is_dense else saved.parent
        if dense and (run.pruner or not saved.is_dense) and not run.folder.dense.exists():
            copy_networks(dense, run.folder.dense)
    return run


def finish(run: Run) -> str:
    """Take a run to its end, and say what came of it. Raises: see `Run.run`."""
    run.run()
    trainee, folder, unit = run.trainee, run.folder, words_of(run.trainee.unit)
    lines = []
    if run.was_finished:
        longer = typed(trainee.script, resume=folder, **{trainee.unit: 2 * run.now})
        lines.append(
            f"the run is finished: it has its {run.now} {unit}; make it longer with: {longer}"
        )
    lines.append(f"{trainee.said(run.measured)} after {run.now:,} {unit}")
    if run.pruner:
        lines += [
            report.reached(run.pruner, run.now),
            f"what each cut did   {folder.path / 'course.png'}",
        ]
    return "\n".join(
        [
            *lines,
            *run.closing,
            f"everything is in   {folder}",
            "compare runs with  tensorboard --logdir runs",
        ]
    )


# --- From a finished agent or autoencoder ----------------------------------------------------


def pruning_run(config: PruneCheckpointConfig, given: list[str]) -> RunConfig:
    """The run that takes a finished network from its checkpoint to the end of its recovery.

    Args:
        config: all settings.
        given: the names of those on the command line.

    Raises:
        UserError: there is no such checkpoint, or a given setting is for the other kind.
    """
    kind, foreign, settings = "an agent", _OF_AUTOENCODERS, _of_agent
    if is_autoencoder(config.checkpoint):
        kind, foreign, settings = "an autoencoder", _OF_AGENTS, _of_autoencoder
    if wrong := sorted(foreign & set(given)):
        raise UserError(f"{wrong[0]} is not for '{config.checkpoint}', which is {kind}")
    return settings(config, given)


def _of_agent(config: PruneCheckpointConfig, given: list[str]) -> TrainConfig:
    agent = load_agent(config.checkpoint)
    return TrainConfig(
        task=agent.task,
        prune=config.prune,
        model=agent.config,
        seed=config.seed,
        env_steps=agent.provenance["env_steps"] + config.env_steps,
        device=config.device,
        threads=config.threads,
        decisions=config.decisions,
        action_repeat=agent.action_repeat,
        eval_every=config.eval_every or 5_000,
        eval_episodes=config.eval_episodes,
        eval_least=config.eval_least,
        run_dir=config.run_dir,
        start_from=str(config.checkpoint),
    )


def _of_autoencoder(config: PruneCheckpointConfig, given: list[str]) -> AutoencoderConfig:
    """Its widths are small beside an agent's, and so are its floors unless they are `given`."""
    floors = AutoencoderConfig().prune
    own = {n: getattr(floors, n) for n in ("min_width", "round_to") if f"prune.{n}" not in given}
    saved = load_autoencoder(config.checkpoint)
    return replace(
        from_plain(AutoencoderConfig, saved.config),
        prune=replace(config.prune, distil=0, **own),
        seed=config.seed,
        updates=saved.provenance["updates"] + config.updates,
        eval_every=config.eval_every or 500,
        threads=config.threads,
        run_dir=config.run_dir,
        start_from=str(config.checkpoint),
        resume=None,
    )


def explain(config: PruneCheckpointConfig, given: list[str]) -> tuple[Plan, Refit | None]:
    """The plan of one cut to the final sparsity, written to the file `config.explain`.

    Returns:
        The plan, and what a refit would reach.

    Raises:
        UserError: see `start`.
        RunError: the file cannot be written.
    """
    run = prepare(pruning_run(config, given))
    run.gather_all()
    calibration = run.calibration()
    proposal = run.pruner.propose_whole(calibration)
    refit = run.pruner.cut(proposal, run.now, calibration if config.prune.refit else None)
    write_file(config.explain, proposal.plan.as_json(), "explain")
    return proposal.plan, refit


def widths_after(config: PruneCheckpointConfig) -> Widths:
    """An agent's widths after one cut to the final sparsity. Raises UserError: no such plan."""
    run = prepare(pruning_run(config, []))
    run.gather_all()
    plan = run.pruner.propose_whole(run.calibration()).plan
    commit(plan, run.pruner.structure, run.trainee.computation())
    return run.trainee.model.widths
