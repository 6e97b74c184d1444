"""Checkpoints: what is saved comes back; damage, strangers and full disks are refused by name."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.prunable import component_parameters
from tdmpc_prune.saving.agents import load_agent, save_agent
from tdmpc_prune.saving.run_folder import checkpoint_dir
from tdmpc_prune.training import launch
from tests.small import AGENT, small_config

width = st.integers(1, 9)


@settings(max_examples=30, deadline=None)
@given(
    widths=st.builds(
        Widths,
        observation=width,
        action=width,
        latent=width,
        encoder=st.tuples(width),
        dynamics=st.tuples(width, width),
        reward=st.tuples(width, width),
        policy=st.tuples(width, width),
        q_ensemble=st.lists(st.tuples(width, width), min_size=1, max_size=3).map(tuple),
    )
)
def test_any_widths_come_back(tmp_path_factory, widths):
    folder = tmp_path_factory.mktemp("agent")
    model = WorldModel(widths)
    assert model.widths == widths
    save_agent(folder / "agent", Agent(model, AGENT, "cartpole-swingup", 8, {"seed": 3}))
    loaded = load_agent(folder / "agent")
    assert loaded.model.widths == widths
    assert loaded.config == AGENT
    assert (loaded.task, loaded.action_repeat, loaded.provenance["seed"]) == (
        "cartpole-swingup",
        8,
        3,
    )
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_every_parameter_belongs_to_one_component():
    widths = Widths(5, 1, 50, (256,), (512, 512), (512, 512), (512, 512), ((512, 512),) * 2)
    model = WorldModel(widths)
    components = component_parameters(model)
    assert list(components) == [
        "encoder",
        "dynamics",
        "reward",
        "policy",
        "q_ensemble.0",
        "q_ensemble.1",
    ]
    count = sum(p.numel() for group in components.values() for p in group)
    assert count == sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == 1.49  # as published, on cartpole
    with pytest.raises(ValueError, match="belongs to no component"):
        component_parameters(torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "run"
    launch.start(small_config(run_dir, env_steps=80), []).run()
    return run_dir


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_json_says_what_and_whence(run):
    agent = json.loads((checkpoint_dir(run) / "agent.json").read_text())
    assert agent["format_version"] == 1
    assert agent["provenance"]["env_steps"] == 80
    assert agent["provenance"]["versions"]["torch"] == torch.__version__
    assert len(agent["provenance"]["returns"]) == 2


@pytest.mark.parametrize("file", ["agent.safetensors", "training.safetensors", "agent.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_refused_by_name(copy, file, damage):
    path = checkpoint_dir(copy) / file
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        path.write_bytes(content[:-9] + b"\x00\xff\x13" + content[-6:])
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        launch.resume(small_config(copy, resume=str(copy)), ["resume"])
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "somebody else's"}, "not a checkpoint of this package"),
        ({"format_version": 99}, "format version 99"),
        ({"widths": {}}, "damaged"),
        ({"config": {"planner": {"samplez": 3}}}, "samplez"),
    ],
)
def test_foreign_checkpoints_are_refused(copy, change, message):
    path = checkpoint_dir(copy) / "agent.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_agent(copy)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_agent(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_agent(tmp_path / "nowhere")


def test_a_wrong_level_says_what_can_be_given(copy):
    newest = checkpoint_dir(copy)
    for wrong, right in (
        (copy.parent, copy),
        (copy / "checkpoints", newest),
        (newest / "agent.json", newest),
        (copy / "agents" / "step-9", copy),
        (copy / "history.jsonl", copy),
    ):
        with pytest.raises(UserError) as error:
            load_agent(wrong)
        assert re.search(rf"there (is|are) .*{re.escape(str(right))}\b", str(error.value))
    with pytest.raises(UserError, match=rf"it lies in {copy}"):
        launch.resume(small_config(copy, resume=str(newest)), ["resume"])
    with pytest.raises(UserError, match=rf"there is {copy}"):
        launch.resume(small_config(copy, resume=str(copy.parent)), ["resume"])


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_can_be_read_by_whom_the_umask_lets(tmp_path, mask):
    before = os.umask(mask)
    try:
        launch.start(small_config(tmp_path / "run", env_steps=60), []).run()
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        mode = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == mode & ~mask, path


def test_a_crash_during_a_save_leaves_the_checkpoint_before(copy, monkeypatch):
    """At each file that is written, and at the renaming."""
    whole = load_agent(copy).model.state_dict()
    trainer = launch.resume(small_config(copy, resume=str(copy)), ["resume"])
    for function in (
        "run_folder.write_json",
        "run_folder.save_tensors",
        "files._flush",
        "files.os.replace",
    ):
        calls = 0

        def crash(*_, **__):
            nonlocal calls
            calls += 1
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"tdmpc_prune.saving.{function}", crash)
            trainer.save()
        assert calls == 1
        again = load_agent(copy).model.state_dict()
        assert all(torch.equal(again[name], value) for name, value in whole.items())
    trainer.save()
    assert [p.name[:1] for p in (copy / "checkpoints").iterdir()] == ["0"]  # nothing left behind


def test_a_full_disk_loses_no_earlier_checkpoint(copy):
    """For real: the system refuses to write beyond a few kilobytes."""
    before = checkpoint_dir(copy)
    script = (
        "import resource, signal, sys\n"
        "from tdmpc_prune.training import launch\n"
        "from tests.small import small_config\n"
        f"config = small_config({str(copy)!r}, resume={str(copy)!r})\n"
        "trainer = launch.resume(config, ['resume'])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try:\n    trainer.save()\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(RunError.__name__), done.stderr
    assert "could not be saved" in done.stdout
    assert checkpoint_dir(copy) == before
    load_agent(copy)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
