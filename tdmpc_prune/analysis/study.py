"""A study of pruning methods: which jobs it has, and how one of them is run.

Every seed of a task starts with one dense agent. From its checkpoint each arm goes its own way:
one cut to the asked sparsity, then training for the same env steps. A finished job is a
`result.json` in its folder and is never repeated; one that was killed goes on from its newest
checkpoint. Several commands may work in one folder.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from tdmpc_prune.agent.controller import decision_milliseconds
from tdmpc_prune.analysis import study_pictures, study_report
from tdmpc_prune.analysis.arms import ARMS, DENSE
from tdmpc_prune.analysis.config import StudyCommand, StudyConfig
from tdmpc_prune.analysis.study_job import (
    FAILURES,
    RESULT,
    START,
    Job,
    check_dense,
    run_arm,
    run_start,
)
from tdmpc_prune.envs import make_env
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.machine import commit, machine
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.saving.files import read_json, write_file, write_json
from tdmpc_prune.settings import by_dotted_name
from tdmpc_prune.signals import Stopped
from tdmpc_prune.words import counted

_SETTINGS = "study.json"
_MAY_DIFFER = {  # among the results of one folder
    f"study.{name}" for name in ("tasks", "arms", "sparsities", "seeds", "device", "out")
}
_ATTEMPTS = 2
_FAILED = "the job failed:"  # the line above every traceback
_TIMED = 11  # decisions of each agent, the agents in turn
_NAMED = 5  # failed jobs that are named


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


def name_of(config: StudyConfig, job: Job) -> str:
    """A job in few words, and which of the study's it is."""
    sparsity = "" if job.sparsity is None else f" {job.sparsity:g}"
    everything = all_jobs(config)
    place = f"{everything.index(job) + 1}/{len(everything)}"
    return f"{place} {job.task} {job.arm}{sparsity} seed {job.seed}"


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
    return (job.folder(config.out) / RESULT).is_file()


def attempts(config: StudyConfig, job: Job) -> int:
    """How often a job has failed."""
    path = job.folder(config.out) / FAILURES
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
    return sorted(Path(out).glob(f"*/*/seed*/{RESULT}"))


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
        result = _run(config, job, name_of(config, job))
    except Stopped as stopped:
        print(f"'{job}' was {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from stopped
    except Exception:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FAILURES).open("a") as file:
            file.write(f"{_FAILED}\n{traceback.format_exc()}\n")
        return f"{name_of(config, job)}: failed, see {folder / FAILURES}"
    result |= {"seconds": time.perf_counter() - began, "machine": machine(), "commit": commit()}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{RESULT}.part"
    write_json(part, result)
    part.replace(folder / RESULT)
    return f"{name_of(config, job)}: done in {_clock(result['seconds'])}; {_left(config)}"


def _run(config: StudyConfig, job: Job, name: str) -> dict[str, Any]:
    if job.arm == START:
        return run_start(config, job, name)
    if not done(config, job.start):
        raise RunError(f"'{job.start}' has no result, which '{job}' starts from")
    return run_arm(config, job, read_json(job.start.folder(config.out) / RESULT), name)


def _left(config: StudyConfig) -> str:
    """How many jobs are done, and how long the others may take."""
    everything = all_jobs(config)
    seconds = [
        read_json(job.folder(config.out) / RESULT)["seconds"]
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
    for start in jobs(config)[0] if config.dense else []:
        check_dense(config, start)
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
        files = [(job, job.folder(config.out) / FAILURES) for job in failed[:_NAMED]]
        names = "; ".join(f"'{job}' ({file})" for job, file in files)
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise RunError(
            f"{len(failed)} jobs have no result: {names}{more}; those that failed twice are tried "
            f"again when {FAILURES} is deleted"
        )


def collect(out: str) -> list[study_report.Result]:
    """All results in a study's folder, by task, arm, sparsity and seed.

    How long the agents take to decide is measured here, one after another in turn, so that whatever
    else the machine does meets all alike.
    """
    paths = [path for path in _results(out) if read_json(path)["job"]["arm"] != START]
    found = [read_json(path) for path in paths]
    agents = [load_agent(p.parent / r["agent"]) for p, r in zip(paths, found, strict=True)]
    times = decision_milliseconds(*agents, repeats=_TIMED)
    results = [
        study_report.of_job(result, float(np.median(own)))
        for result, own in zip(found, times, strict=True)
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
