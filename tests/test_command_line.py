"""The commands as a person types them: help, results, and one line for wrong input."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tdmpc_prune.arguments import Settings
from tdmpc_prune.command_line import run_command
from tdmpc_prune.deploy.config import ExportConfig
from tdmpc_prune.saving.run_folder import checkpoint_dir
from tdmpc_prune.settings import to_plain, typed
from tdmpc_prune.training.config import TrainConfig
from tests.commands import ROOT, SMALL, run, run_process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=cartpole-swngup"], "the closest are cartpole-swingup"),
        (["task=gym:CartPole-v1"], "Discrete actions"),
        (["task=gym:tests.synthetic:Dictionary-v0"], "Dict observations"),
        (["sede=3"], "unknown setting 'sede'; did you mean seed"),
        (["model.planner.sampels=3"], "did you mean model.planner.samples"),
        (["seed=abc"], "seed=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        (["model.planner.elites=300"], "elites=300 cannot exceed model.planner.samples=256"),
        (["model.planner.horizon=0"], "model.planner.horizon=0 must be at least 1"),
        (["model.learning.discount=1.5"], "discount=1.5 must lie in"),
        (["model.learning.buffer_decisions=3"], "must exceed model.learning.horizon=3"),
        (["env_steps=-1"], "env_steps=-1 must be at least 1"),
        (["action_repeat=0"], "action_repeat=0 must be at least 1"),
        (["model=papr"], "the choices are default, paper"),
        (["prune=nothing"], "prune=nothing is not a choice"),
        (["device=tpu"], "device=tpu must be auto, cpu or cuda"),
        (["resume=nowhere"], "'nowhere' is not the folder of a run"),
        (["seed"], "seed has no value: a setting is given as name=value, seed=1"),
        (["cartpole-swingup"], "write task=cartpole-swingup"),
        (["bayesian"], "write prune=bayesian"),
        ([""], "an argument is empty"),
        (["seed=1,2"], "seed=1,2 is several values: add -m"),
        (["task=a,b"], """quote it: 'task="a,b"'"""),
        (["env_steps=1.5"], "env_steps=1.5: Value '1.5'"),
        (["--seed=3"], "settings have no dashes; write seed=3"),
        (["--foo"], "--foo is no option"),
        (["--cfg"], "write --cfg job"),
        (["+seed=1"], "write seed=1, without '+'"),
        (["~seed"], "without '~'"),
        (["seed="], "seed= has no value; the default is 1"),
        (["prune="], "prune= has no value; the choices are none, compensated"),
        (["prune={a: 1}"], "prune={a: 1} is not a choice"),
        (["prune=bayesian", "prune=none"], "prune=… is given twice"),
        (["prune=bayesian", "prune.protect=latent"], "write 'prune.protect=[latent]'"),
        (["prune=bayesian", "prune.protect=a,b"], "write 'prune.protect=[a,b]'"),
        (["prune=bayesian", "prune.protect=[a"], "write 'prune.protect=[a]'"),
        (["prune=bayesian", "prune.min_widths=16"], "write 'prune.min_widths={<name>: 16}'"),
        (["seed=(1"], "could not be converted to Integer"),
        (["seed=${foo}"], "Interpolation key 'foo' not found"),
        (["seed=${"], "could not be converted"),
        (["model.network=3"], "model.network is a group of settings"),
        (["hydra/launcher=nolauncher"], "the choices are basic, joblib"),
        (["hydra.launcher.n_jobs=[1"], "brackets and quotes come in pairs"),
        (["=3"], "unknown setting ''"),
        (["sparsity=0.9"], "did you mean prune=bayesian prune.sparsity=0.9?"),
        (["prune=bayesian", "sparsity=0.9"], "did you mean prune.sparsity=0.9?"),
        (["prune.sparsity=0.9"], "prune.sparsity=0.9 has no effect without prune=…; add prune=bay"),
        (["prune=none", "prune.protect=[latent]"], "prune.protect=[latent] has no effect without"),
        (["prune=bayesian", "prune.gather_updates=3"], "has no effect in a run from scratch"),
        (["prune=bayesian", "prune.eval_episodes=20"], "above eval_episodes=10; add eval_episodes"),
        (["prune=bayesian", "prune.plan=p", "prune.steps=3"], "has no effect with prune.plan=…"),
        (["prune=bayesian", "prune.steps=1", "prune.shape=cubic"], "with prune.steps=1"),
        (["prune=random", "prune.compare=false", "prune.memory=0.5"], "prune.compare=false"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_starts(tmp_path, arguments, message):
    done = run("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_autoencoder.py", ["data.dir=x"], "has no effect with data=digits"),
        (
            "train_autoencoder.py",
            ["prune=random", "prune.eval_episodes=2"],
            "has no effect in this",
        ),
        (
            "prune.py",
            ["x", "explain=p.json", "run_dir=r"],
            "run_dir=r has no effect with explain=…",
        ),
        ("prune.py", ["x", "explain=p.json", "prune.steps=2"], "has no effect with explain=…"),
        ("evaluate.py", ["x", "y"], "'y' is one checkpoint too many"),
        ("evaluate.py", ["x", "checkpoint=y"], "'x' is one checkpoint too many"),
        ("evaluate.py", ["x", "viewer=true", "episodes=2"], "has no effect with viewer=true"),
        ("evaluate.py", ["runs/a=b c"], "checkpoint 'runs/a=b c' does not exist"),
        ("fit.py", ["x", "env_steps=0", "prune.steps=3"], "has no effect where nothing is cut"),
        ("groups.py", ["x", "task=b"], "task=b has no effect with checkpoint=…"),
        ("benchmark.py", ["seed=3"], "seed=3 has no effect without checkpoint=…"),
        ("benchmark.py", ["x", "model=paper"], "model has no effect with checkpoint=…"),
        ("optimize_coefficients.py", ["x", "budget=3"], "add method=grid"),
        ("compare_coefficients.py", ["x", "prune.method=taylor"], "has no effect in this command"),
        ("sensitivity.py", ["x", "prune.sparsity=0.3"], "has no effect in this command"),
        ("study.py", ["report=x", "job=3"], "job=3 has no effect with report=…"),
        ("study.py", ["hydra/launcher=nolauncher"], "the choices are basic, joblib"),
        ("study.py", ["quick"], "write study=quick"),
        ("importance.py", ["checkpoint=x"], "'x' has no history of importance"),
    ],
)
def test_what_other_commands_refuse_is_one_line(tmp_path, script, arguments, message):
    done = run(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed_as", "value"),
    [("env_steps=1e5", 100_000), ("env_steps=100_000", 100_000),
     ("run_dir=runs/a b=c", "runs/a b=c"), ("run_dir=runs/ä", "runs/ä"),
     ("run_dir=1e5", "1e5"), ("run_dir=a(b)", "a(b)"),
     ('run_dir="a b"', "a b"), ("run_dir=null", None), ("run_dir=~/x#1", "~/x#1")],
)  # fmt: skip
def test_values_are_taken_as_they_are_meant(tmp_path, typed_as, value):
    done = run("train.py", "--cfg", "job", typed_as, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)[typed_as.split("=")[0]] == value


def test_a_study_shows_its_settings(tmp_path):
    done = run("study.py", "--cfg", "job", "study=quick", cwd=tmp_path)
    assert done.returncode == 0 and "out: studies/quick" in done.stdout


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1))
def test_printed_commands_are_read_back_as_they_were_meant(value):
    _, _, word = shlex.split(typed("train.py", resume=value))
    read = OverridesParser.create().parse_override(word).value()
    assert read.replace(r"\${", "${") == value


@pytest.mark.parametrize("name", ["a=b c", "Übung 'x' \"y\"", "[1, 2]", "1e5"])
def test_printed_commands_can_be_pasted(tmp_path, name):
    done = run("train.py", *SMALL, f"run_dir={name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("evaluate it with")]
    _, script, *arguments = shlex.split(line.removeprefix("evaluate it with"))
    done = run(Path(script).name, *arguments, "episodes=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run("evaluate.py", name, "episodes=1", cwd=tmp_path).returncode == 0


def test_help_begins_with_what_matters_most_in_100_columns(tmp_path):
    done = run("train.py", "--help", cwd=tmp_path)
    names = re.findall(r"^  ([a-z_]+)=", done.stdout, re.MULTILINE)
    assert names[:5] == ["task", "prune", "seed", "env_steps", "run_dir"]
    assert "    prune=taylor" in done.stdout and "    model=paper" in done.stdout
    assert "python scripts/train.py task=cartpole-swingup prune=bayesian" in done.stdout
    for script in sorted((ROOT / "scripts").glob("*.py")):
        if script.name not in ("compare.py", "run_exported.py"):
            done = run(script.name, "--help", cwd=tmp_path)
            assert max(map(len, done.stdout.splitlines())) <= 100
            assert "Examples:" in done.stdout


def test_output_that_nobody_reads_or_that_cannot_be_shown_is_no_traceback(tmp_path):
    command = f"{sys.executable} {ROOT / 'scripts/train.py'} --help"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; {command} | head -n 1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.stdout.startswith("Train a TD-MPC agent")
    for arguments in (["--help"], ["task=cartpöle"], ["ä=1"]):
        done = run_process("train.py", *arguments, cwd=tmp_path, PYTHONIOENCODING="ascii")
        assert "Traceback" not in done.stderr and done.returncode == (
            2 if "=" in arguments[0] else 0
        )


@pytest.mark.parametrize(
    ("script", "setting"),
    [
        ("train.py", "device=auto"),
        ("prune.py", "device=auto"),
        ("groups.py", "json=null"),
        ("evaluate.py", "viewer=False"),
        ("benchmark.py", "device=auto"),
        ("fit.py", "rate_hz=100.0"),
        ("export.py", "part=planner"),
    ],
)
def test_help_documents_every_setting(tmp_path, script, setting):
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert setting in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert all(len(line.split(maxsplit=1)) == 2 for line in rows)
    assert "MISSING" not in done.stdout and "object at" not in done.stdout
    if script == "prune.py":
        assert "prune.end=0.6" in done.stdout and "prune.sparsity=0.9" in done.stdout


SCRIPTS = [
    path.name
    for path in sorted((ROOT / "scripts").glob("*.py"))
    if path.name not in ("compare.py", "run_exported.py")
]


def schema_of(script):
    """The dataclass that a script gives its command."""
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    return next(iter(typing.get_type_hints(main).values()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_help_prints_as_a_default_is_what_the_run_gets(tmp_path, script):
    done = run(script, "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    schema = schema_of(script)
    assert yaml.safe_load(done.stdout) == to_plain(schema())
    for declared in Settings(schema).declared.values():
        if declared.choices:
            first, other = list(declared.choices)[:2]
            chosen = run(script, "--cfg", "job", f"{declared.name}={first}", cwd=tmp_path)
            assert chosen.stdout == done.stdout
            chosen = run(script, "--cfg", "job", f"{declared.name}={other}", cwd=tmp_path)
            assert chosen.stdout != done.stdout


def test_help_and_refusals_wait_for_no_simulator_and_no_network(tmp_path):
    """In a process of its own: what one command had imported, the next would have for nothing."""
    code = f"""
import contextlib, io, runpy, sys
for script in {SCRIPTS}:
    for arguments in (["--help"], ["no_such_setting=3"], ["hydra.launcher.n_jobs=[1"]):
        sys.argv = ["{ROOT}/scripts/" + script, *arguments]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            runpy.run_path(sys.argv[0], run_name="__main__")
for arguments in (["seed=abc"], ["model=papr"], ["threads=0"], ["model.planner.elites=300"]):
    sys.argv = ["{ROOT}/scripts/train.py", *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
heavy = ("torch", "scipy", "matplotlib", "tensorboard", "joblib", "mujoco", "gymnasium", "sklearn")
print(*[name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert len(done.stderr.splitlines()) == 2 * len(SCRIPTS) + 4


@pytest.mark.parametrize(
    ("schema", "arguments", "threads"),
    [
        (TrainConfig, ["threads=3"], [3]),
        (TrainConfig, [], [1]),
        (ExportConfig, ["x"], [1]),
        (TrainConfig, ["-m", "threads=2,3"], [2, 3]),
    ],
)
def test_a_command_works_with_the_threads_that_it_was_given(
    tmp_path, monkeypatch, schema, arguments, threads
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command.py", *arguments])
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        run_command(schema, lambda config, given: found.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert found == threads


def test_train_evaluate_and_read_the_logs(tmp_path):
    done = run("train.py", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/gym-tests.synthetic-Reach-v0/none/seed1"
    assert f"checkpoint={folder.relative_to(tmp_path)}" in done.stdout
    assert "evaluation at 60 env steps: return" in done.stdout
    assert not done.stderr  # the progress bar is for terminals

    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    evaluations = [line for line in history if line["kind"] == "evaluation"]
    assert [line["env_steps"] for line in evaluations] == [60, 120]

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    logged = [(e.step, e.value) for e in events.Scalars("evaluation/return")]
    assert [step for step, _ in logged] == [60, 120]
    assert [value for _, value in logged] == pytest.approx([e["mean_return"] for e in evaluations])
    for group in ("training", "losses", "gradients", "planner", "speed"):
        assert any(tag.startswith(f"{group}/") for tag in tags), group
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert "! read me first/text_summary" in events.Tags()["tensors"]
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert list(charts)[:3] == ["return", "sparsity", "planning MACs"]
    assert all(tag in tags for title in list(charts)[:3] for tag in charts[title])

    done = run("evaluate.py", f"checkpoint={folder}", "episodes=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 episodes from seed 0" in done.stdout and "dense parent" not in done.stdout

    again = run("train.py", *SMALL, cwd=tmp_path)
    assert again.returncode == 2 and "already holds a run" in again.stderr


def test_sweeps(tmp_path):
    done = run("train.py", "-m", *SMALL, "seed=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/gym-tests.synthetic-Reach-v0/none"
    assert sorted(path.name for path in folder.iterdir()) == ["seed1", "seed2"]


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
def test_a_sweep_goes_on_past_a_job_that_fails(tmp_path, launcher):
    more = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    assert run("train.py", *SMALL, "seed=1", cwd=tmp_path).returncode == 0
    done = run("train.py", "-m", *SMALL, "seed=1,2", *more, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "error: 1 of 2 jobs failed: seed=1: 'runs/" in last and "already holds a run" in last
    assert checkpoint_dir(tmp_path / "runs/gym-tests.synthetic-Reach-v0/none/seed2").exists()
    done = run("train.py", "-m", *SMALL, "seed=3,4", "prune.steps=3", cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 2 of 2 jobs failed: seed=3, seed=4: prune.steps=3 has no effect")


@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    [
        ("basic", signal.SIGTERM, 143),
        ("joblib", signal.SIGINT, 130),
        pytest.param("basic", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("joblib", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_a_whole_sweep_and_all_jobs_save(tmp_path, launcher, number, code):
    arguments = ["env_steps=100000", "eval_every=100000"]
    if launcher == "joblib":
        arguments += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train.py"), "-m", *SMALL, "seed=1,2,3", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = tmp_path / "runs/gym-tests.synthetic-Reach-v0/none"
    seeds = [1, 2] if launcher == "joblib" else [1]
    deadline = time.monotonic() + 120
    for seed in seeds:
        history = folder / f"seed{seed}/history.jsonl"
        while not history.exists() or len(history.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in errors, errors
    assert sorted(path.name for path in folder.iterdir()) == [f"seed{seed}" for seed in seeds]
    for seed in seeds:
        assert (checkpoint_dir(folder / f"seed{seed}") / "training.json").exists()


def test_a_swept_choice_may_leave_settings_without_effect_in_one_job(tmp_path):
    done = run(
        "train.py", "-m", *SMALL, "prune=none,random", "prune.min_width=2", "prune.round_to=1",
        "prune.sparsity=0.5", "prune.steps=2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.xdist_group("timing")
def test_benchmark(tmp_path):
    done = run("benchmark.py", *SMALL[5:], "repeats=2", "json=speed.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "speed.json").read_text())
    decision, update = result["measurements"]
    cost = result["pruning"]
    # Which of two short times is longer, another process may decide.
    assert cost["one_metric_milliseconds"] > 0 and cost["all_metrics_milliseconds"] > 0
    assert cost["cut_seconds"] > 0 and "a cut of half the parameters" in done.stdout
    assert (decision["what"], update["what"]) == ("decision", "update")
    assert decision["floor_milliseconds"] > 0 and decision["milliseconds"] > 0
    assert "times the floor" in done.stdout


def test_a_missing_or_foreign_checkpoint_is_one_line(tmp_path):
    (tmp_path / "agent.json").write_text("{}")
    for checkpoint, message in (("nowhere", "does not exist"), (".", "not a checkpoint")):
        done = run("evaluate.py", f"checkpoint={checkpoint}", cwd=tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


@pytest.mark.parametrize("script", ["sensitivity.py", "optimize_coefficients.py"])
def test_what_ranks_nothing_is_no_choice(tmp_path, script):
    """In a process of its own: in this one other commands have declared it."""
    done = run_process(script, "checkpoint=.", "prune=none", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: prune=none is not a choice; the choices are bayesian")
