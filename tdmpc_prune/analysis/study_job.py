"""What one job of a study does: the dense agent of a seed, or one arm of the comparison.

An arm makes its agent first, with no env step: by the very cut that `prune.py` makes, by teaching a
small student, or by drawing new weights. That agent is read where it is; then it is trained on, on
the dense agent's replay buffer. Where that has made it worse, by the episodes that are watched on
the way, an arm ends with the agent that it began with, which its user has still.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.deciding import choose
from tdmpc_prune.agent.distillation import distil
from tdmpc_prune.agent.learner import update_macs
from tdmpc_prune.analysis import coefficients
from tdmpc_prune.analysis.arms import CUTS, DENSE, REINITIALISED, SMALL, STUDENT
from tdmpc_prune.analysis.config import CoefficientsConfig, StudyConfig
from tdmpc_prune.analysis.subject import load_subject
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import EVALUATION_SEED, evaluate
from tdmpc_prune.machine import choose_device
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.saving.files import read_json, write_json
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.settings import by_dotted_name, to_plain
from tdmpc_prune.thresholds import back_at
from tdmpc_prune.training import launch, student
from tdmpc_prune.training.config import DistilConfig, PruneCheckpointConfig, TrainConfig
from tdmpc_prune.training.run import Run
from tdmpc_prune.words import folder_name

START = "start"  # the dense agent that all arms of a seed begin with
FINAL_SEED = EVALUATION_SEED + 20_000  # initial states by which no run chooses anything
RESULT, FAILURES = "result.json", "failures.txt"
_MADE, _CUT, _PLAN = "made.json", "cut", "coefficients.json"
_TYPED = ["study.py"]


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    task: str
    arm: str  # START, or one of `arms.ARMS`
    sparsity: float | None  # asked for; None where nothing is cut
    seed: int

    def folder(self, out: str) -> Path:
        """Where it lies; every seed has its own."""
        task = folder_name(self.task)
        arm = self.arm if self.sparsity is None else f"{self.arm}-{self.sparsity:g}"
        return Path(out) / task / arm.replace(" ", "-") / f"seed{self.seed}"

    def __str__(self) -> str:
        sparsity = "" if self.sparsity is None else f" at {self.sparsity:g}"
        return f"{self.task}, {self.arm}{sparsity}, seed {self.seed}"

    @property
    def start(self) -> Job:
        """The dense agent that it begins with."""
        return replace(self, arm=START, sparsity=None)


# --- Dense agents -------------------------------------------------------------------------------


def dense_run(config: StudyConfig, job: Job) -> Path:
    """The run of the dense agent that a job begins with."""
    if config.dense is None:
        return job.start.folder(config.out)
    return Path(config.dense) / folder_name(job.task) / PruneConfig().method / f"seed{job.seed}"


def check_dense(config: StudyConfig, job: Job) -> None:
    """Refuse dense runs that the study cannot start from. They are read, never written to.

    Raises:
        UserError: there is none, or it is of another task or other settings, pruned, or without
            its replay buffer.
    """
    run = dense_run(config, job)
    agent = load_agent(run, task=job.task)
    theirs, ours = (
        by_dotted_name(to_plain(each), "study.model.") for each in (agent.config, config.model)
    )
    for name, value in theirs.items():
        if value != ours[name]:
            raise UserError(
                f"study.dense: '{run}' has {name.removeprefix('study.')}={value}, the study "
                f"{ours[name]}: give {name}={value}"
            )
    if not agent.is_dense:
        raise UserError(f"study.dense: '{run}' is pruned")
    if not (agent.folder / "training.json").is_file():
        raise UserError(f"study.dense: '{run}' has no replay buffer to start from")


def run_start(config: StudyConfig, job: Job, name: str) -> dict[str, Any]:
    """Train a dense agent, unless it is given, and read it. `name` is the job's, in few words."""
    if config.dense is None:
        settings = TrainConfig(
            task=job.task,
            model=config.model,
            seed=job.seed,
            env_steps=config.start_env_steps,
            eval_every=max(1, config.start_env_steps // 5),
            eval_episodes=config.episodes,
            eval_least=config.episodes,
            device=config.device,
            run_dir=str(job.folder(config.out)),
        )
        _begun_or_resumed(settings).run(name)
    agent = _agent(config, dense_run(config, job))
    return {
        "job": vars(job),
        "returns": _final(config, agent),
        "watched": _watched(config, agent),
        "env_steps": agent.provenance["env_steps"],
    } | agent.size()


# --- Arms ---------------------------------------------------------------------------------------


def run_arm(config: StudyConfig, job: Job, dense: dict[str, Any], name: str) -> dict[str, Any]:
    """Make an arm's agent, train it on, and read it.

    Args:
        config: of the study.
        job: an arm's.
        dense: the result of its start.
        name: of the job, in few words.
    """
    folder, total = job.folder(config.out), dense["env_steps"] + config.env_steps
    made = None if job.arm in (DENSE, SMALL) else _make(config, job, name)
    where = folder / _CUT if made else dense_run(config, job)
    curve = [(0, made["watched"])] if made else [(0, dense["watched"])] if job.arm == DENSE else []
    returns, trained, updates = made["after"] if made else dense["returns"], None, 0
    if config.env_steps or job.arm == SMALL:
        run = _trained_on(config, job, where, total)
        run.run(name)
        began = (0, 0) if job.arm == SMALL else (total - config.env_steps, _updates(where))
        for line in run.folder.read_history("evaluation"):
            curve.append((line["env_steps"] - began[0], line["returns"]))
        updates = run.trainee.learner.updates - began[1]
        trained = _final(config, _agent(config, folder))
        if np.mean(curve[-1][1]) >= np.mean(curve[0][1]):
            where, returns = folder, trained
    agent = load_agent(where)
    enough = back_at(float(np.mean(dense["watched"])))
    back = [at for at, found in curve if np.mean(found) >= enough]
    return {
        "job": vars(job),
        "agent": os.path.relpath(where, folder),
        "before": float(np.mean(dense["returns"])),
        "after": made["after"] if made else None,
        "recovery": back[0] if back else None,
        "trained": trained,
        "returns": returns,
        "curve": curve,
        "env_steps": total,
        "budget": config.env_steps,
        "cut_seconds": made["seconds"] if made else None,
        "updates": updates,
        "training_macs": updates * update_macs(agent.model, agent.config.learning),
    } | agent.size()


def _make(config: StudyConfig, job: Job, name: str) -> dict[str, Any]:
    """The readings of an arm's agent with 0 env steps, which is left in the folder `cut`.

    Returns:
        Its returns `after` the cut, those of the episodes `watched` on the way, and the CPU
        `seconds` that it took to make, its measurements left out.
    """
    folder = job.folder(config.out)
    path, cut = folder / _MADE, folder / _CUT
    if path.is_file():
        return read_json(path)
    shutil.rmtree(cut, ignore_errors=True)  # one that was killed: it begins anew
    folder.mkdir(parents=True, exist_ok=True)
    if job.arm in (STUDENT, REINITIALISED):
        seconds = _leave_new_networks(config, job, cut)
    else:
        seconds = _leave_cut_networks(config, job, cut, name)
    agent = _agent(config, cut)
    made = {"after": _final(config, agent), "watched": _watched(config, agent), "seconds": seconds}
    part = path.with_suffix(".part")
    write_json(part, made)
    part.replace(path)
    return made


def _leave_cut_networks(config: StudyConfig, job: Job, folder: Path, name: str) -> float:
    """Cut the dense agent as `prune.py` does."""
    cut, start = CUTS[job.arm], str(dense_run(config, job))
    prune = cut.prune(job.sparsity, config.allocation, config.min_width)
    began = time.process_time()
    if cut.searched:
        search = CoefficientsConfig(
            checkpoint=start, sparsity=job.sparsity, largest=1.0, prune=prune, seed=job.seed
        )
        subject = load_subject(start, prune, config.episodes, job.seed)
        path = job.folder(config.out) / _PLAN
        coefficients.find(search, subject)[0].save(path)
        prune = replace(prune, plan=str(path))
    searched = time.process_time() - began
    run = launch.start(launch.pruning_run(_command(config, job, prune, folder), []), _TYPED)
    run.run(name)
    return searched + run.pruning_seconds


def _leave_new_networks(config: StudyConfig, job: Job, folder: Path) -> float:
    """New ones in place of the dense agent's: taught by it, or of the widths of a cut."""
    start, began = str(dense_run(config, job)), time.process_time()
    if job.arm == STUDENT:
        settings = DistilConfig(start, job.sparsity, seed=job.seed, device=config.device)
        model, teacher, _ = student.fit(settings, load_agent(start))
        distil(model, teacher, settings.steps, seed=settings.seed)
    else:
        prune = CUTS["bayesian"].prune(job.sparsity, config.allocation, config.min_width)
        widths = launch.widths_after(_command(config, job, prune, folder))
    seconds = time.process_time() - began
    run = launch.start(_training(config, job, Path(start), folder, 0), _TYPED)
    run.take_networks(model if job.arm == STUDENT else run.trainee.draw(widths, _new_seed(job)))
    run.save()
    return seconds


def _trained_on(config: StudyConfig, job: Job, where: Path, total: int) -> Run:
    """The training of an arm up to `total` env steps, new or taken up again.

    Args:
        config: of the study.
        job: an arm's.
        where: its agent lies before; a small one from scratch has only its task from there.
        total: env steps.
    """
    settings = _training(config, job, where, job.folder(config.out), config.env_steps)
    if job.arm != SMALL:
        return _begun_or_resumed(settings)
    settings = replace(settings, start_from=None, eval_every=total)
    if _has_checkpoint(settings):
        return _begun_or_resumed(settings)
    even = CUTS["random"].prune(job.sparsity, "uniform", config.min_width)
    even = replace(even, gather_updates=1)  # which units go says nothing of the widths
    widths = launch.widths_after(_command(config, job, even, Path(settings.run_dir)))
    run = _begun_or_resumed(settings)
    run.take_networks(run.trainee.draw(widths, _new_seed(job)))
    run.save()  # before anything is learnt, so that it is never taken for a dense run
    return run


def _command(
    config: StudyConfig, job: Job, prune: PruneConfig, folder: Path
) -> PruneCheckpointConfig:
    """What would be asked of `prune.py`."""
    return PruneCheckpointConfig(
        checkpoint=str(dense_run(config, job)),
        prune=prune,
        seed=job.seed,
        device=config.device,
        run_dir=str(folder),
    )


def _training(
    config: StudyConfig, job: Job, where: Path, folder: Path, env_steps: int
) -> TrainConfig:
    """Training that goes on with the agent of `where` for so long."""
    agent = load_agent(where)
    return TrainConfig(
        task=job.task,
        model=agent.config,
        seed=job.seed,
        env_steps=agent.provenance["env_steps"] + env_steps,
        eval_every=config.eval_every,
        eval_episodes=config.episodes,
        eval_least=config.episodes,
        action_repeat=agent.action_repeat,
        device=config.device,
        run_dir=str(folder),
        start_from=str(where),
    )


def _new_seed(job: Job) -> int:
    """Of new networks: not those that the dense agent began with."""
    return job.seed + 1_000


def _has_checkpoint(settings: TrainConfig) -> bool:
    return bool(RunFolder(settings.run_dir).checkpoints())


def _begun_or_resumed(settings: TrainConfig) -> Run:
    """A run that was killed before its first checkpoint begins anew."""
    if _has_checkpoint(settings):
        return launch.resume(replace(settings, resume=settings.run_dir), ["resume"])
    for path in Path(settings.run_dir).glob("*"):
        if path.name not in (FAILURES, _PLAN, _MADE, _CUT):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return launch.start(settings, _TYPED)


# --- Readings -----------------------------------------------------------------------------------


def _agent(config: StudyConfig, where: Path) -> Agent:
    return load_agent(where, choose_device(config.device))


def _updates(where: Path) -> int:
    """That the networks there have had."""
    return load_agent(where).provenance["updates"]


def _final(config: StudyConfig, agent: Agent) -> list[float]:
    """Returns from initial states that nothing was chosen by."""
    return _returns(agent, config.final_episodes, FINAL_SEED)


def _watched(config: StudyConfig, agent: Agent) -> list[float]:
    """Returns from the initial states of all evaluations on the way."""
    return _returns(agent, config.episodes, EVALUATION_SEED)


def _returns(agent: Agent, episodes: int, seed: int) -> list[float]:
    path = choose("auto", agent.dense_widths, agent.device).path
    return evaluate(agent, episodes, seed, decisions=path).returns
