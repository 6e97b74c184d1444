"""A study of pruning methods: which jobs it has, and how one of them is run.

Every seed of a task starts with one dense agent. From its checkpoint each arm goes its own way:
one cut to the asked sparsity, then training for the same env steps. A finished job is a
`result.json` in its folder and is never repeated; one that was killed goes on from its newest
checkpoint. Several commands may work in one folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from tdmpc_prune.agent.controller import decision_milliseconds
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.analysis import coefficients as optimize_coefficients
from tdmpc_prune.analysis import study_pictures, study_report
from tdmpc_prune.analysis.config import (
    ARMS,
    COEFFICIENTS,
    DENSE,
    REINITIALISED,
    SMALL,
    CoefficientsConfig,
    StudyCommand,
    StudyConfig,
)
from tdmpc_prune.analysis.subject import load_subject
from tdmpc_prune.envs import make_env
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.evaluation import EVALUATION_SEED, evaluate
from tdmpc_prune.machine import machine
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.saving.files import read_json, write_file, write_json
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.settings import by_dotted_name
from tdmpc_prune.signals import Stopped
from tdmpc_prune.thresholds import back_at
from tdmpc_prune.training import launch
from tdmpc_prune.training.config import PruneCheckpointConfig, TrainConfig
from tdmpc_prune.training.run import Run
from tdmpc_prune.words import counted, folder_name

START = "start"  # the dense agent that all arms of a seed begin with
_RESULT, _FAILURES, _SETTINGS = "result.json", "failures.txt", "study.json"
_MAY_DIFFER = {  # among the results of one folder
    f"study.{name}" for name in ("tasks", "arms", "sparsities", "seeds", "device", "out")
}
_ATTEMPTS = 2
_FAILED = "the job failed:"  # the line above every traceback
_TIMED = 11  # decisions of each agent, the agents in turn
_NAMED = 5  # failed jobs that are named


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    task: str
    arm: str  # START, or one of `config.ARMS`
    sparsity: float | None  # asked for; None where nothing is cut
    seed: int

    def folder(self, out: str) -> Path:
        """Where it lies; every seed has its own."""
        task = folder_name(self.task)
        arm = self.arm if self.sparsity is None else f"{self.arm}-{self.sparsity:g}"
        return Path(out) / task / arm.replace(" ", "-") / f"seed{self.seed}"

    def name(self, config: StudyConfig) -> str:
        """In few words, and which of the study's jobs it is."""
        sparsity = "" if self.sparsity is None else f" {self.sparsity:g}"
        everything = all_jobs(config)
        place = f"{everything.index(self) + 1}/{len(everything)}"
        return f"{place} {self.task} {self.arm}{sparsity} seed {self.seed}"

    def __str__(self) -> str:
        sparsity = "" if self.sparsity is None else f" at {self.sparsity:g}"
        return f"{self.task}, {self.arm}{sparsity}, seed {self.seed}"

    @property
    def start(self) -> Job:
        """The dense agent that it begins with."""
        return replace(self, arm=START, sparsity=None)


def jobs(config: StudyConfig) -> list[list[Job]]:
    """All jobs, in two stages: the second needs the first."""
    starts = [Job(t, START, None, s) for t in config.tasks for s in config.seeds]
    arms = []
    for start in starts:
        for arm in config.arms:
            for sparsity in [None] if arm == DENSE else config.sparsities:
                arms.append(Job(start.task, arm, sparsity, start.seed))
    return [starts, arms]


def all_jobs(config: StudyConfig) -> list[Job]:
    return [job for stage in jobs(config) for job in stage]


def pending(config: StudyConfig, stage: list[Job]) -> list[Job]:
    """Jobs of a stage that can be run, and are neither done nor given up."""
    return [
        job
        for job in stage
        if not done(config, job)
        and attempts(config, job) < _ATTEMPTS
        and (job.arm == START or done(config, job.start))
    ]


def done(config: StudyConfig, job: Job) -> bool:
    return (job.folder(config.out) / _RESULT).is_file()


def attempts(config: StudyConfig, job: Job) -> int:
    """How often a job has failed."""
    path = job.folder(config.out) / _FAILURES
    return path.read_text().splitlines().count(_FAILED) if path.is_file() else 0


def claim_folder(config: StudyConfig) -> None:
    """Write down what all results in `config.out` have in common, or check that it is the same.

    Raises:
        UserError: the folder holds results of other settings.
        RunError: it cannot be written.
    """
    shared = by_dotted_name(asdict(config), "study.")
    shared = {name: value for name, value in shared.items() if name not in _MAY_DIFFER}
    path = Path(config.out) / _SETTINGS
    if not path.is_file():
        if _results(config.out):
            raise UserError(f"study.out={config.out} holds results of settings that are not known")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"study.out={config.out} cannot be made: {error.strerror}") from error
        write_file(path, json.dumps(shared, indent=1) + "\n", "study.out")
        return
    there = read_json(path)
    for name, value in shared.items():
        if there.get(name) != value:
            raise UserError(
                f"study.out={config.out} holds results of {name}={there.get(name)}, which cannot "
                f"be compared with {name}={value}: give the same, or another study.out"
            )


def _results(out: str) -> list[Path]:
    return sorted(Path(out).glob(f"*/*/seed*/{_RESULT}"))


def run_job(config: StudyConfig, job: Job) -> str | None:
    """Run a job to its end and write its result, or note in its folder how it failed; and say so.

    Nothing is done and said if it has a result, or if another process is at it.
    """
    folder = job.folder(config.out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(Timeout), FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
        if not done(config, job):
            return _run_locked(config, job, folder)
    return None


def _run_locked(config: StudyConfig, job: Job, folder: Path) -> str:
    began = time.perf_counter()
    try:
        result = _run_start(config, job) if job.arm == START else _run_arm(config, job)
    except Stopped as stopped:
        print(f"'{job}' was {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from stopped
    except Exception:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _FAILURES).open("a") as file:
            file.write(f"{_FAILED}\n{traceback.format_exc()}\n")
        return f"{job.name(config)}: failed, see {folder / _FAILURES}"
    result |= {"seconds": time.perf_counter() - began, "machine": machine()}
    part = folder / f".{_RESULT}.part"
    write_json(part, result)
    part.replace(folder / _RESULT)
    return f"{job.name(config)}: done in {_clock(result['seconds'])}; {_left(config)}"


def _left(config: StudyConfig) -> str:
    """How many jobs are done, and how long the others may take."""
    everything = all_jobs(config)
    seconds = [
        read_json(job.folder(config.out) / _RESULT)["seconds"]
        for job in everything
        if done(config, job)
    ]
    left = (len(everything) - len(seconds)) * float(np.mean(seconds))
    time_left = f", about {_clock(left)} of computing left" if left else ""
    return f"{len(seconds)} of {counted(len(everything), 'job')} are done{time_left}"


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)


def sweeps(command: StudyCommand) -> Iterator[tuple[str, str]]:
    """For each sweep, the override of its jobs, and how far the study is.

    To be asked for the next when the one before is done.

    Raises:
        UserError, TaskError: before any job is run; see `claim_folder`.
    """
    if command.report:
        return
    config = command.study
    everything = all_jobs(config)
    for task in config.tasks:
        make_env(task).close()
    claim_folder(config)
    if command.job is not None:
        if not 0 <= command.job < len(everything):
            raise UserError(f"job={command.job} must lie in 0 … {len(everything) - 1}")
        yield f"job={command.job}", ""
        return
    for stage in jobs(config):
        for _ in range(_ATTEMPTS):
            if left := pending(config, stage):
                finished = sum(done(config, job) for job in everything)
                numbers = ",".join(str(everything.index(job)) for job in left)
                far = f"{finished} of {len(everything)} jobs are done; {len(left)} come now"
                yield f"job={numbers}", far


def conclude(command: StudyCommand) -> Iterator[str]:
    """Write table, pictures and CSV of all results in the folder, and say what they are.

    Raises:
        UserError: there is no such CSV to report.
        RunError: jobs failed twice, or nothing was done.
    """
    if command.report:
        yield from _report(study_report.of_csv(Path(command.report)), Path(command.report))
        return
    config, path = command.study, Path(command.study.out) / "results.csv"
    if results := collect(config.out):
        write_file(path, study_report.as_csv(results), "study.out")
        yield from _report(results, path)
    everything = [all_jobs(config)[command.job]] if command.job is not None else all_jobs(config)
    finished = sum(done(config, job) for job in everything)
    yield f"{finished} of {len(everything)} jobs are done, the dense agents at the start included"
    failed = [job for job in everything if not done(config, job)]
    if failed:
        files = [(job, job.folder(config.out) / _FAILURES) for job in failed[:_NAMED]]
        names = "; ".join(f"'{job}' ({file})" for job, file in files)
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise RunError(
            f"{len(failed)} jobs have no result: {names}{more}; those that failed twice are tried "
            f"again when {_FAILURES} is deleted"
        )


def collect(out: str) -> list[study_report.Result]:
    """All results in a study's folder, by task, arm, sparsity and seed.

    How long the agents take to decide is measured here, one after another in turn, so that whatever
    else the machine does meets all alike.
    """
    paths = [path for path in _results(out) if read_json(path)["job"]["arm"] != START]
    agents = [load_agent(path.parent) for path in paths]
    times = decision_milliseconds(*agents, repeats=_TIMED)
    results = [
        study_report.of_job(read_json(path), float(np.median(own)))
        for path, own in zip(paths, times, strict=True)
    ]
    return sorted(results, key=lambda r: (r.task, ARMS.index(r.arm), r.asked or 0, r.seed))


def _report(results: list[study_report.Result], path: Path) -> Iterator[str]:
    """The tables; they and the pictures are written beside their CSV."""
    tables = study_report.tables(results)
    yield tables
    write_file(path.with_suffix(".md"), tables, "the report")
    for name, image in study_pictures.pictures(results).items():
        write_file(path.with_name(f"{path.stem}-{name}.png"), image, "the report")
    yield f"written beside {path}: tables (.md) and pictures (.png)"


# --- What a job does -------------------------------------------------------------------------


def _run_start(config: StudyConfig, job: Job) -> dict[str, Any]:
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
    run = _begun_or_resumed(settings)
    returns = run.run(job.name(config)).returns
    return {"job": vars(job), "returns": returns} | run.size()


def _run_arm(config: StudyConfig, job: Job) -> dict[str, Any]:
    start = job.start
    if not done(config, start):
        raise RunError(f"'{start}' has no result, which '{job}' starts from")
    dense = read_json(start.folder(config.out) / _RESULT)
    before = float(np.mean(dense["returns"]))
    run = _run_of(config, job, str(start.folder(config.out)))
    after = _new_networks_return(run, job) if job.arm == REINITIALISED else None
    evaluation = run.run(job.name(config))
    tracked = [e for e in run.folder.read_history("tracking") if e["moment"] == "after"]
    if tracked:
        after = tracked[0]["returns"]
    began = 0 if job.arm == SMALL else run.config.env_steps - config.env_steps
    curve = [(0, after)] if after else [(0, dense["returns"])] if job.arm == DENSE else []
    curve += [(e["env_steps"] - began, e["returns"]) for e in run.folder.read_history("evaluation")]
    back = [at for at, returns in curve if np.mean(returns) >= back_at(before)]
    return {
        "job": vars(job),
        "before": before,
        "after": after,
        "recovery": back[0] if back else None,
        "returns": evaluation.returns,
        "curve": curve,
        "env_steps": run.now,
    } | run.size()


def _run_of(config: StudyConfig, job: Job, start: str) -> Run:
    """The run of an arm, new or taken up again."""
    pruning = PruneCheckpointConfig(
        checkpoint=start,
        prune=_pruning(config, job),
        env_steps=config.env_steps,
        seed=job.seed,
        device=config.device,
        eval_every=config.eval_every,
        eval_episodes=config.episodes,
        eval_least=config.episodes,
        run_dir=str(job.folder(config.out)),
    )
    settings = launch.pruning_run(pruning, [])
    if job.arm not in (DENSE, SMALL, REINITIALISED):
        if job.arm == COEFFICIENTS:
            prune = replace(settings.prune, plan=_coefficients(config, job, start))
            settings = replace(settings, prune=prune)
        return _begun_or_resumed(settings)
    settings = replace(settings, prune=PruneConfig())
    if job.arm == SMALL:
        settings = replace(settings, start_from=None, eval_every=config.start_env_steps)
        pruning = replace(pruning, prune=replace(pruning.prune, allocation="uniform"))
    if job.arm == DENSE or _has_checkpoint(settings):
        return _begun_or_resumed(settings)
    widths = launch.widths_after(pruning)
    run = _begun_or_resumed(settings)
    run.take_networks(_new_networks(widths, job))
    run.save()  # before anything is learnt, so that it is never taken for a dense run
    return run


def _new_networks(widths: Widths, job: Job) -> WorldModel:
    """Not those that the dense agent began with."""
    return WorldModel(widths, torch.Generator().manual_seed(job.seed + 1_000))


def _new_networks_return(run: Run, job: Job) -> list[float]:
    """The returns right after the networks were initialised anew, whatever was learnt since."""
    agent = run.trainee.agent()
    anew = replace(agent, model=_new_networks(agent.model.widths, job))
    path, episodes = run.trainee.choice.path, run.config.eval_episodes
    return evaluate(anew, episodes, EVALUATION_SEED, decisions=path).returns


def _pruning(config: StudyConfig, job: Job) -> PruneConfig:
    """One plain cut at the start, never undone; arms without a metric take bayesian's."""
    arms = (DENSE, SMALL, REINITIALISED, COEFFICIENTS)
    return PruneConfig(
        method="bayesian" if job.arm in arms else job.arm,
        sparsity=job.sparsity or config.sparsities[0],
        start=0.0,
        end=0.0,
        steps=1,
        allocation=config.allocation,
        refit=False,
        min_width=config.min_width,
        round_to=1,
        max_return_drop=1e9,
        compare=False,
        eval_episodes=config.episodes,
    )


def _coefficients(config: StudyConfig, job: Job, start: str) -> str:
    """The file of a plan whose coefficients were found by gradient descent."""
    folder = job.folder(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coefficients.json"
    if not path.is_file():
        prune = _pruning(config, job)
        search = CoefficientsConfig(
            checkpoint=start, sparsity=job.sparsity, largest=1.0, prune=prune, seed=job.seed
        )
        subject = load_subject(start, prune, config.episodes, job.seed)
        optimize_coefficients.find(search, subject)[0].save(path)
    return str(path)


def _has_checkpoint(settings: TrainConfig) -> bool:
    return bool(RunFolder(settings.run_dir).checkpoints())


def _begun_or_resumed(settings: TrainConfig) -> Run:
    """A run that was killed before its first checkpoint begins anew."""
    folder = Path(settings.run_dir)
    if _has_checkpoint(settings):
        return launch.resume(replace(settings, resume=settings.run_dir), ["resume"])
    for path in folder.glob("*"):
        if path.name not in (_FAILURES, "coefficients.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return launch.start(settings, ["study.py"])
