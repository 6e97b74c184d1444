"""The study: its jobs, going on after a kill, failures, launchers, and its statistics."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc_prune.agent.distillation import distil
from tdmpc_prune.analysis import study, study_job, study_pictures, study_report
from tdmpc_prune.analysis.arms import ARMS, CUTS, LATENT, LATENT_STEPS
from tdmpc_prune.analysis.config import STUDIES, StudyCommand
from tdmpc_prune.analysis.study_job import Job
from tdmpc_prune.analysis.study_report import Result
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.evaluation import EVALUATION_SEED, Evaluation
from tdmpc_prune.machine import commit, versions
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.saving.files import read_json
from tdmpc_prune.training import mending
from tests.commands import ROOT, run
from tests.small import AGENT

TINY = [
    "study.tasks=['gym:tests.synthetic:Reach-v0']",
    "study.seeds=[1]",
    "study.sparsities=[0.5]",
    "study.start_env_steps=100",
    "study.env_steps=40",
    "study.eval_every=20",
    "study.episodes=2",
    "study.final_episodes=2",
    "study.out=out",
    "study.model.network.encoder_width=12",
    "study.model.network.latent_width=6",
    "study.model.network.hidden_width=16",
    "study.model.planner.horizon=3",
    "study.model.planner.samples=24",
    "study.model.planner.elites=6",
    "study.model.learning.seed_decisions=40",
    "study.model.learning.batch=16",
]


def config(tmp_path, **changes):
    small = replace(STUDIES["quick"].value, model=AGENT, tasks=["gym:tests.synthetic:Reach-v0"])
    small = replace(small, start_env_steps=100, env_steps=40, eval_every=20, episodes=2)
    small = replace(small, final_episodes=3, seeds=[1], sparsities=[0.5])
    return replace(small, out=str(tmp_path / "out"), **changes)


def run_all(config):
    """Every job; what is on file of each arm."""
    for job in study.all_jobs(config):
        study.run_job(config, job)
        assert study.attempts(config, job) == 0, failures(config, job).read_text()
    arms = {job.arm: job.folder(config.out) for job in study.jobs(config)[1]}
    return {arm: read_json(folder / "result.json") for arm, folder in arms.items()}


def failures(config, job):
    return job.folder(config.out) / "failures.txt"


@pytest.fixture
def briefly(monkeypatch):
    """Students are taught, and coefficients searched for, in a few steps."""
    search = partial(study_job.CoefficientsConfig, steps=5)
    monkeypatch.setattr(study_job, "CoefficientsConfig", search)
    monkeypatch.setattr(
        study_job, "distil", lambda model, teacher, _, seed: distil(model, teacher, 5, seed=seed)
    )


def test_jobs_are_the_product_and_every_folder_is_its_own():
    full = STUDIES["full"].value
    starts, arms = study.jobs(full)
    assert len(starts) == len(full.tasks) * len(full.seeds)
    cut = len(full.arms) - 1  # all but dense have a run for every sparsity
    assert len(arms) == len(starts) * (1 + cut * len(full.sparsities))
    folders = [job.folder(full.out) for job in starts + arms]
    assert len(set(folders)) == len(folders)


def test_every_arm_runs_and_only_once(tmp_path, undrawn, briefly):
    arms = ["dense", "small from scratch", "small with the teacher", "re-initialised"]
    arms += ["magnitude", "coefficients refitted"]
    tiny = config(tmp_path, arms=arms)
    found = run_all(tiny)
    results = {arm: study_report.of_job(result, 1.0) for arm, result in found.items()}
    for job in study.jobs(tiny)[1]:
        path = job.folder(tiny.out) / "result.json"
        before = path.stat().st_mtime_ns
        study.run_job(tiny, job)
        assert path.stat().st_mtime_ns == before
    runs = {job.arm: job.folder(tiny.out) for job in study.jobs(tiny)[1]}
    dense = results["dense"]
    assert dense.sparsity == 0 and dense.after is None and dense.env_steps == 140
    for arm in arms[1:]:
        assert 0.5 <= results[arm].sparsity < 0.6
        assert results[arm].before == dense.before and results[arm].env_steps == 140
        assert len(found[arm]["returns"]) == 3
        own = load_agent(runs[arm])
        assert own.size()["parameters"] == results[arm].parameters
    small, again = results["small from scratch"], results["re-initialised"]
    assert small.after is None and small.recovery is None and again.after is not None
    # Even widths from scratch and with the teacher; those of bayesian's cut, initialised anew.
    assert abs(small.parameters - again.parameters) < 0.2 * small.parameters
    widths = {arm: load_agent(runs[arm]).model.widths for arm in arms[1:4]}
    assert widths["small from scratch"].reward[0] == widths["small from scratch"].policy[0]
    assert widths["small with the teacher"] == widths["small from scratch"]
    assert widths["re-initialised"] != widths["small from scratch"]
    start = study.all_jobs(tiny)[0].folder(tiny.out)
    episodes = {arm: _env_steps_of_episodes(folder) for arm, folder in runs.items()}
    assert len(episodes["small from scratch"]) == len(_env_steps_of_episodes(start)) + 2
    assert all(len(episodes[arm]) == 2 for arm in arms if arm != "small from scratch")
    assert [at for at, _ in found["magnitude"]["curve"]] == [0, 20, 40]
    assert [at for at, _ in found["dense"]["curve"]] == [0, 20, 40]
    # Every env step is a decision here, with an update.
    updates = {arm: result["updates"] for arm, result in found.items()}
    assert updates.pop("small from scratch") == 140 and set(updates.values()) == {40}
    assert found["magnitude"]["training_macs"] < found["dense"]["training_macs"]
    searched, plain = (found[arm]["cut_seconds"] for arm in ("coefficients refitted", "magnitude"))
    assert searched > plain > 0 and found["dense"]["cut_seconds"] is None


@pytest.mark.parametrize("trained", [49.0, 51.0])
def test_an_arm_ends_with_the_better_agent_and_both_are_told(
    dense, tmp_path, monkeypatch, undrawn, trained
):
    """The evaluation on the way says which; right after the cut it was 50."""
    tiny = config(tmp_path, dense=str(dense), arms=["dense", "magnitude"], env_steps=20)
    cut = Job(tiny.tasks[0], "magnitude", 0.5, 1).folder(tiny.out)
    monkeypatch.setattr("tdmpc_prune.analysis.study_job._watched", lambda *_: [50.0])
    monkeypatch.setattr(
        "tdmpc_prune.analysis.study_job._final",
        lambda _, agent: [2.0 if agent.folder.is_relative_to(cut / "cut") else 3.0],
    )
    monkeypatch.setattr(
        "tdmpc_prune.training.agent.evaluate",
        lambda agent, episodes, *_, **__: Evaluation([trained] * episodes, 1, 1.0),
    )
    found = run_all(tiny)["magnitude"]
    line = study_report.of_job(found, 1.0)
    assert (line.after, line.trained) == (2, 3)
    older = {name: value for name, value in found.items() if name != "trained"}
    assert study_report.of_job(older, 1.0) == replace(line, trained=None)
    assert line.end == (3 if trained > 50 else 2)
    assert found["agent"] == ("." if trained > 50 else "cut")


# --- Right after the cut, from dense runs that are there ------------------------------------------


@pytest.fixture
def dense(small_run, tmp_path):
    """A folder of dense runs with one in it, of 200 env steps."""
    folder = tmp_path / "dense"
    shutil.copytree(small_run[0], folder / "gym-tests.synthetic-Reach-v0/none/seed1")
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_agents_are_read_right_after_the_cut_from_dense_runs_that_are_only_read(
    dense, tmp_path, undrawn, briefly
):
    arms = ["dense", "small from scratch", "small with the teacher", "bayesian refitted", LATENT]
    tiny = config(tmp_path, arms=arms, dense=str(dense), env_steps=0)
    before = contents(dense)
    found = run_all(tiny)
    assert contents(dense) == before
    start = study.all_jobs(tiny)[0]
    assert not (start.folder(tiny.out) / "run.json").exists()
    for arm, result in found.items():
        assert len(result["returns"]) == 3 and result["env_steps"] == 200, arm
        assert result["budget"] == 0 and result["commit"] == commit()
        if arm not in arms[:2]:
            assert result["after"] == result["returns"] and result["updates"] == 0
    assert found["dense"]["before"] == np.mean(found["dense"]["returns"])
    small = next(job for job in study.jobs(tiny)[1] if job.arm == "small from scratch")
    assert _env_steps_of_episodes(small.folder(tiny.out)) == [20 * (i + 1) for i in range(10)]
    results = study.collect(tiny.out)
    assert [r.arm for r in results] == arms
    tables = study_report.tables(results)
    assert "Return right after the cut, as a fraction" in tables and "back at" not in tables
    assert "CPU seconds of the cut" in tables
    (axis,) = study_pictures._answer(results).axes
    assert axis.get_ylabel() == "return right after the cut"
    assert len(study_pictures._against_sparsity(results).axes) == 1


def test_a_cut_is_the_one_that_prune_makes(dense, tmp_path, undrawn):
    tiny = config(tmp_path, arms=[LATENT], dense=str(dense), env_steps=0, sparsities=[0.6])
    found = run_all(tiny)
    (job,) = study.jobs(tiny)[1]
    start = dense / "gym-tests.synthetic-Reach-v0/none/seed1"
    more = ("prune.sparsity=0.6", f"prune.distil={LATENT_STEPS}", "run_dir=by-hand", "device=cpu")
    done = run("prune.py", str(start), *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = load_agent(job.folder(tiny.out) / found[LATENT]["agent"]).model.state_dict()
    theirs = load_agent(tmp_path / "by-hand").model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_offline_steps_of_an_arm_are_all_that_come_before_the_distillation():
    assert CUTS[LATENT].offline_steps == mending.LATENT_STEPS


def test_what_nothing_was_chosen_by_decides(dense, tmp_path, monkeypatch):
    """The final readings are from other initial states than all that a run measures."""
    seeds = []

    def evaluate(agent, episodes, seed, **_):
        seeds.append((seed, episodes))
        return Evaluation([1.0] * episodes, 1, 1.0)

    monkeypatch.setattr(study_job, "evaluate", evaluate)
    tiny = config(tmp_path, arms=["dense"], dense=str(dense), env_steps=0)
    run_all(tiny)
    assert seeds == [(study_job.FINAL_SEED, 3), (EVALUATION_SEED, 2)]
    assert EVALUATION_SEED + 10_000 + 10 < study_job.FINAL_SEED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 2]}, "seed2' does not exist"),
        (
            {"model": replace(AGENT, planner=replace(AGENT.planner, samples=25))},
            "has model.planner.samples=24, the study 25: give study.model.planner.samples=24",
        ),
        ({"tasks": ["gym:tests.synthetic:Rare-v0"]}, "Rare-v0/none/seed1' does not exist"),
    ],
)
def test_dense_runs_that_do_not_fit_are_refused(dense, tmp_path, changes, message):
    tiny = replace(config(tmp_path, dense=str(dense)), **changes)
    with pytest.raises(UserError) as refused:
        next(study.sweeps(StudyCommand(tiny)))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_pruned_agents_and_those_without_a_buffer_are_no_start(dense, pruned_run, tmp_path):
    run_folder = dense / "gym-tests.synthetic-Reach-v0/none/seed1"
    tiny = config(tmp_path, dense=str(dense))
    (training,) = run_folder.glob("checkpoints/*/training.json")
    training.unlink()
    with pytest.raises(UserError, match="has no replay buffer to start from"):
        next(study.sweeps(StudyCommand(tiny)))
    shutil.rmtree(run_folder)
    shutil.copytree(pruned_run[0], run_folder)
    with pytest.raises(UserError, match="seed1' is pruned"):
        next(study.sweeps(StudyCommand(tiny)))


def test_a_cut_that_was_killed_is_made_anew_and_a_made_one_is_kept(dense, tmp_path, undrawn):
    tiny = config(tmp_path, arms=["random"], dense=str(dense), env_steps=0)
    start, job = study.all_jobs(tiny)
    study.run_job(tiny, start)
    half = job.folder(tiny.out) / "cut"
    half.mkdir(parents=True)
    (half / "run.json").write_text("{}")
    study.run_job(tiny, job)
    assert study.done(tiny, job), failures(tiny, job).read_text()
    (job.folder(tiny.out) / "result.json").unlink()
    before = contents(half)
    study.run_job(tiny, job)
    assert study.done(tiny, job) and contents(half) == before


def test_the_commit_is_that_of_the_checkout():
    ask = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        head = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        head = versions()["tdmpc-prune"]
    assert head.startswith(commit().removesuffix("-dirty"))


# --- Failures, kills and launchers ----------------------------------------------------------------


def _env_steps_of_episodes(folder):
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [line["env_steps"] for line in lines if line["kind"] == "episode"]


def test_a_job_that_fails_is_tried_twice_and_never_dropped(tmp_path, monkeypatch):
    tiny = config(tmp_path, arms=["dense", "magnitude"])

    def explode(*arguments):
        raise ValueError("it is broken") from KeyError("deep inside")

    monkeypatch.setattr(study, "run_arm", explode)
    rounds = []
    for override, _ in study.sweeps(StudyCommand(tiny)):
        numbers = [int(number) for number in override.removeprefix("job=").split(",")]
        rounds.append(numbers)
        for number in numbers:
            study.run_job(tiny, study.all_jobs(tiny)[number])
    assert rounds == [[0], [1, 2], [1, 2]]
    with pytest.raises(Exception, match=r"2 jobs have no result: .*magnitude at 0.5, seed 1"):
        list(study.conclude(StudyCommand(tiny)))
    failures = study.all_jobs(tiny)[1].folder(tiny.out) / "failures.txt"
    assert failures.read_text().count("ValueError: it is broken\n") == 2


def test_arms_wait_for_their_dense_agent(tmp_path, monkeypatch):
    tiny = config(tmp_path, arms=["dense", "magnitude"])
    monkeypatch.setattr(study, "run_start", lambda *_: 1 / 0)
    rounds = []
    for override, _ in study.sweeps(StudyCommand(tiny)):
        rounds.append(override)
        study.run_job(tiny, study.all_jobs(tiny)[0])
    assert rounds == ["job=0", "job=0"]
    with pytest.raises(RunError, match=r"3 jobs have no result: .*start, seed 1'"):
        list(study.conclude(StudyCommand(tiny)))


def test_a_job_that_another_process_runs_is_left_to_it(tmp_path, monkeypatch):
    tiny = config(tmp_path, arms=["dense"])
    job, ran = study.all_jobs(tiny)[0], []
    monkeypatch.setattr(study, "_run_locked", lambda *_: ran.append(1))
    study.run_job(tiny, job)
    folder = job.folder(tiny.out)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        study.run_job(tiny, job)
    assert ran == [1]


def test_one_job_alone(tmp_path):
    done = run("study.py", *TINY, "study=quick", "study.arms=[dense]", "job=0", cwd=tmp_path)
    assert done.returncode == 0 and "1 of 1 jobs are done" in done.stdout, done.stderr
    done = run("study.py", *TINY, "study=quick", "study.arms=[dense]", "job=2", cwd=tmp_path)
    assert done.returncode == 2 and "job=2 must lie in 0 … 1" in done.stderr


def test_a_folder_with_results_of_other_settings_is_refused(tmp_path):
    tiny = config(tmp_path, arms=["dense", "magnitude"])
    study.claim_folder(tiny)
    study.claim_folder(replace(tiny, seeds=[1, 2], sparsities=[0.9], arms=["dense"]))
    with pytest.raises(UserError, match=r"holds results of study.env_steps=40, .*env_steps=50: "):
        study.claim_folder(replace(tiny, env_steps=50))
    other = replace(AGENT, planner=replace(AGENT.planner, samples=25))
    with pytest.raises(UserError, match=r"planner.samples=24.*samples=25: give the same"):
        next(study.sweeps(StudyCommand(replace(tiny, model=other))))
    done = run("study.py", *TINY, "study=quick", f"study.out={tiny.out}", cwd=tmp_path)
    assert done.returncode == 2 and "give the same, or another study.out" in done.stderr
    folder = tmp_path / "old/task/arm/seed1"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    with pytest.raises(UserError, match="holds results of settings that are not known"):
        study.claim_folder(replace(tiny, out=str(tmp_path / "old")))


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    arguments = [*TINY, "study=quick", "study.arms=[dense]", "study.start_env_steps=1200"]
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    history = tmp_path / "out/gym-tests.synthetic-Reach-v0/start/seed1/history.jsonl"
    while not (history.exists() and len(history.read_text().splitlines()) > 20):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    before = _env_steps_of_episodes(history.parent)
    assert len(before) < 60 and not (history.parent / "failures.txt").exists()
    done = run("study.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = _env_steps_of_episodes(history.parent)
    assert after[: len(before)] == before and after == [20 * (i + 1) for i in range(60)]


@pytest.mark.parametrize(
    "launcher",  # Ray takes most of a minute to begin and to end; the basic one is Hydra's own
    ["joblib", *(pytest.param(name, marks=pytest.mark.slow) for name in ("basic", "ray"))],
)
def test_launchers(tmp_path, launcher):
    if launcher == "ray" and not importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("Ray is not installed (pip install -e '.[ray]')")
    more = {"joblib": ["hydra.launcher.n_jobs=2"], "ray": ["+hydra.launcher.ray.init.num_cpus=2"]}
    arguments = [*TINY, "study=quick", "study.arms=[random,magnitude]"]
    arguments += [f"hydra/launcher={launcher}", *more.get(launcher, [])]
    done = run("study.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    written = {"results.csv", "results.md"}
    written |= {f"results-{name}.png" for name in ("answer", "sparsity", "profile", "cost")}
    assert written <= names
    results = study_report.of_csv(tmp_path / "out" / "results.csv")
    assert [(r.arm, r.asked, r.seed) for r in results] == [
        ("magnitude", 0.5, 1),
        ("random", 0.5, 1),
    ]
    assert study_report.tables(results) == (tmp_path / "out" / "results.md").read_text()


def test_a_csv_is_reported_again_without_any_run(tmp_path):
    results = [
        result("dense", 1, 99.0, asked=None, after=None, recovery=0),
        result("random", 1, 9.0),
    ]
    (tmp_path / "r.csv").write_text(study_report.as_csv(results))
    done = run("study.py", "report=r.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert study_report.tables(results) in done.stdout
    names = {"r.csv", "r.md"}
    names |= {f"r-{name}.png" for name in ("answer", "sparsity", "profile", "cost")}
    assert {path.name for path in tmp_path.iterdir()} == names
    done = run("study.py", "report=nowhere.csv", cwd=tmp_path)
    assert done.returncode == 2 and "'nowhere.csv' is no table of a study" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study=huge"], "study=huge is not a choice; the choices are full, quick"),
        (["study.arms=[dense,best]"], "'best' must be one of dense"),
        (["study.sparsities=[1.5]"], "1.5 must lie in (0, 1)"),
        (["study.seeds=[]"], "study.seeds is empty"),
        (["study.seeds=[1,1]"], "repeats a value"),
        (["study.seeds=[-1]"], "-1 cannot be negative"),
        (["study.tasks=[cartpole-swngup]"], "cartpole-swngup"),
        (["study.device=banana"], "device=banana must be auto, cpu or cuda"),
        (["study.allocation=fair"], "study.allocation=fair must be one of global, balanced"),
        (["study.env_steps=-1"], "study.env_steps=-1 cannot be negative"),
        (["study.final_episodes=0"], "study.final_episodes=0 must be at least 1"),
        (["study.dense=x", "study.start_env_steps=9"], "has no effect with study.dense=…"),
        (["study.env_steps=0", "study.eval_every=9"], "has no effect with study.env_steps=0"),
        (["study.dense=x", "study.tasks=[cartpole-swingup]"], "seed1' does not exist"),
        (["studi.seeds=[1]"], "unknown setting"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, arguments, message):
    done = run("study.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not list(tmp_path.iterdir())


# --- Statistics ------------------------------------------------------------------------------


def result(arm, seed, end, asked=0.5, task="t", **changes):
    return replace(
        Result(task, arm, asked, seed, 0.5, 10, 20, 1.0, 100.0, 40.0, 200, end, 9, 1.0), **changes
    )


def test_statistics_with_known_answers():
    assert study_report.interquartile_mean(np.array([-1000.0, 1, 2, 3, 4, 5, 6, 9000])) == 3.5
    improvement = study_report.improvement_interval
    worse, better = [np.array([1.0, 2, 3])], [np.array([4.0, 5, np.inf])]
    assert improvement(better, worse) == (1.0, 1.0, 1.0)
    assert improvement(worse, better) == (0.0, 0.0, 0.0)
    same = [np.array([1.0, 1.0]), np.array([-np.inf, -np.inf])]
    assert improvement(same, same) == (0.5, 0.5, 0.5)  # equal ones count half
    one, other = [np.array([1.0, 4.0]), np.array([1.0])], [np.array([2.0, 3.0]), np.array([0.0])]
    assert improvement(one, other)[0] == 0.75  # mean of 1/2 and 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1000), min_size=2, max_size=12))
def test_an_interval_holds_its_statistic(values):
    middle, low, high = study_report.iqm_interval([np.array(values)])
    assert low - 1e-9 <= middle <= high + 1e-9
    assert min(values) - 1e-9 <= low and high <= max(values) + 1e-9


def rows_of(text):
    return [[c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines() if "|" in row]


def test_tables_are_of_the_csv_and_no_run_is_left_out(tmp_path):
    results = [
        result("dense", 1, 99.0, asked=None, after=None, recovery=0),
        *(result("magnitude", seed, 50.0 + seed) for seed in (1, 2, 3)),
        *(result("bayesian", seed, 80.0 + 2 * seed, recovery=None) for seed in (1, 2, 3)),
        result("bayesian", 1, 70.0, asked=0.9),
    ]
    path = tmp_path / "r.csv"
    path.write_text(study_report.as_csv(results))
    assert study_report.of_csv(path) == results
    text = study_report.tables(results)
    rows = rows_of(text)
    cell = ["0.5", "magnitude", "3", "10", "0.0", "1.0", "40 [40, 40]", "3 of 3, 200"]
    assert [*cell, "52 [51, 53]"] in rows
    assert ["0.9", "bayesian", "1", "10", "0.0", "1.0", "40", "1 of 1, 200", "70"] in rows
    assert sum(int(row[2]) for row in rows if row[0] in ("", "0.5", "0.9")) == len(results)
    # 0.9 is no cell of magnitude's: only 0.5 counts in what is said of both.
    assert ["bayesian", "3", "0.40 [0.40, 0.40]", "0 of 3", "0.84 [0.82, 0.86]"] in rows
    assert "; without t at 0.9, for lack of runs**" in text
    other = [result(arm, seed, 9.0, task="u") for arm in ("bayesian", "random") for seed in (1, 2)]
    over_all = study_report.tables(results + other).split("**All tasks")[1]
    assert "; without magnitude, random, for lack of runs**" in over_all
    assert [row[:2] for row in rows_of(over_all) if row[0] in ARMS] == [["bayesian", "6"]]
    some = ("bayesian", "taylor", "fisher", "gradient")
    many = [result(arm, 1, 9.0, task="v") for arm in some]
    assert "; without 5 arms, for lack of runs**" in study_report.tables(results + other + many)
    pictures = study_pictures.pictures(results)
    assert all(image.startswith(b"\x89PNG") for image in pictures.values())


def test_what_improves_on_what():
    results = [
        *(result("magnitude", seed, 50.0 + seed) for seed in (1, 2, 3)),
        *(result("bayesian", seed, 80.0 + seed, recovery=None) for seed in (1, 2, 3)),
        *(result("small from scratch", seed, 99.0, after=None) for seed in (1, 2, 3)),
    ]
    rows = [row[1:] for row in rows_of(study_report.tables(results)) if row[0] == "bayesian"]
    never, surely, even = "0.00 [0.00, 0.00]", "1.00 [1.00, 1.00]", "0.50 [0.50, 0.50]"
    assert rows == [
        ["3", "0.40 [0.40, 0.40]", "0 of 3", "0.82 [0.81, 0.83]"],
        [even],  # right after the cut, over magnitude
        [never],  # sooner back
        [surely, never],  # at the end, over magnitude and over small from scratch
    ]
    fewer = [r for r in results if (r.arm, r.seed) != ("magnitude", 3)]
    rows = [row[1:] for row in rows_of(study_report.tables(fewer)) if row[0] == "bayesian"]
    assert rows[1:] == [["0.50"], ["0.00"], ["1.00", never]]  # two runs have no interval


def test_a_share_of_a_negative_return_is_more_when_it_is_better():
    share = study_report.READINGS["end"]
    assert share(result("random", 1, -50.0, before=-100.0)) == 1.5
    assert share(result("random", 1, -200.0, before=-100.0)) == 0
    with pytest.raises(UserError, match="returns 0: nothing to compare"):
        share(result("random", 1, 5.0, before=0.0))


def test_the_answer_is_of_five_arms_and_the_fullest_recipe():
    shown = ["compensated distilled", "small with the teacher", "small from scratch"]
    shown += ["compensated plain", "bayesian refitted"]
    results = [
        result(arm, seed, 10.0 * place + seed)
        for place, arm in enumerate([*shown, "bayesian", "compensated", "random"])
        for seed in (1, 2, 3)
    ]
    assert study_report.shown(results) == shown
    (axis,) = study_pictures._answer(results).axes
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["dense", "95 % of it", *shown]
    (first,) = [c for c in axis.containers if c.get_label() == shown[0]]
    assert first[0].get_ydata() == pytest.approx([2.0])
    ((low, high),) = [segment[:, 1] for segment in first[2][0].get_segments()]
    assert low < 2 < high
    header, row = rows_of(study_report.tables(results))[:3:2]
    assert header[2:] == [f"{arm} (seeds)" for arm in shown]
    assert row[:3] == ["t", "0.5", "0.02 [0.01, 0.03] (3)"]


def test_costs_are_told_and_an_older_table_has_none(tmp_path):
    new = [
        result("bayesian", seed, 5.0, cut_seconds=4.0 + seed, updates=750, training_macs=3 * 10**12)
        for seed in (1, 2, 3)
    ]
    row = ["bayesian", "6.0", "750", "3"]
    assert row in rows_of(study_report.tables(new))
    path = tmp_path / "r.csv"
    path.write_text(study_report.as_csv(new))
    assert study_report.of_csv(path) == new
    lines = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("".join(",".join(line[:14]) + "\n" for line in lines))
    old = study_report.of_csv(path)
    assert [(r.end, r.cut_seconds, r.commit) for r in old] == [(5.0, None, None)] * 3
    assert "costs" not in study_report.tables(old)


def test_the_picture_shows_the_share_of_runs_that_came_back():
    results = [result("random", s, 9.0, recovery=None if s > 1 else 100) for s in range(1, 6)]
    figure = study_pictures._against_sparsity(results)
    (axis,) = [axis for axis in figure.axes if "share of runs" in axis.get_title()]
    assert axis.get_lines()[0].get_ydata().tolist() == [0.2]


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    for path in ("x.csv", "nowhere.csv"):
        with pytest.raises(UserError, match=f"{path}' is no table of a study"):
            study_report.of_csv(tmp_path / path)
    path = tmp_path / "y.csv"
    for results, message in (
        ([], "has no runs"),
        ([result("best", 1, 9.0)], "there is no arm 'best'"),
        ([result("random", 1, 9.0), result("random", 1, 8.0)], "has the run .* twice"),
        ([result("random", 1, 9.0, before=None)], "is no table of a study"),
    ):
        path.write_text(study_report.as_csv(results))
        with pytest.raises(UserError, match=message):
            study_report.of_csv(path)


# --- What the pages say ----------------------------------------------------------------------


def test_the_study_on_file_is_what_its_csv_says():
    """Tables on its page and beside the CSV, and every number in the words, the README's too."""
    shown = ROOT / ".readme"
    text = study_report.tables(study_report.of_csv(shown / "study.csv"))
    assert (shown / "study.md").read_text() == text
    page = (shown / "study-findings.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 10 and set(rows) <= set(text.splitlines())
    readme = (ROOT / "README.md").read_text()
    (finding,) = [line for line in readme.splitlines() if "study-findings.md" in line]
    words = re.sub(
        r"```.*?```|\([^()]*\.(png|md|csv|json)\)", "", f"{page}\n{finding}", flags=re.DOTALL
    )
    words = "\n".join(line for line in words.splitlines() if not line.startswith("|"))
    number = r"\d[\d ]*(?:\.\d+)?"
    said = {found.replace(" ", "") for found in re.findall(number, words)}
    settings_ = json.loads((shown / "study.json").read_text())
    known = text.replace(",", "") + " ".join(map(str, settings_.values()))
    assert len(said) > 10
    assert said <= set(re.findall(r"\d+(?:\.\d+)?", known)), said
    for name in ("answer", "sparsity", "profile", "cost"):
        assert (shown / f"study-{name}.png").is_file()
        assert f"(study-{name}.png)" in page
