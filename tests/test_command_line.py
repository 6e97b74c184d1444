"""The commands as a person types them: help, results, and one line for wrong input."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tests.commands import SMALL, run


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
        (["model.learning.buffer_decisions=5"], "must exceed model.learning.horizon=5"),
        (["env_steps=-1"], "env_steps=-1 must be at least 1"),
        (["action_repeat=0"], "action_repeat=0 must be at least 1"),
        (["model=papr"], "the choices are default, paper"),
        (["prune=nothing"], "prune=nothing is not a choice"),
        (["device=tpu"], "device=tpu must be auto, cpu or cuda"),
        (["resume=nowhere"], "'nowhere' is not the folder of a run"),
        (["seed"], "missing EQUAL"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_starts(tmp_path, arguments, message):
    done = run("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not list(tmp_path.iterdir())


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
    settings = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert all(len(line.split(maxsplit=1)) == 2 for line in settings)
    assert "MISSING" not in done.stdout and "object at" not in done.stdout
    if script == "prune.py":
        assert "prune.end=0.6" in done.stdout and "prune.sparsity=0.9" in done.stdout


def test_train_evaluate_and_read_the_logs(tmp_path):
    done = run("train.py", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/gym-tests.synthetic-Reach-v0/none/seed1"
    assert f"checkpoint={folder.relative_to(tmp_path)}" in done.stdout
    assert "evaluation" in done.stderr and "loss" in done.stderr  # the progress bar

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
