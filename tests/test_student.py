"""Small students that are taught offline: sizes, what is on file, and wrong input."""

import shutil
from dataclasses import replace

import pytest
import torch

from tdmpc_prune.saving.agents import load_agent, save_agent
from tdmpc_prune.training import student
from tdmpc_prune.training.config import DistilConfig
from tests.commands import run


@pytest.fixture(scope="module")
def dense(small_run):
    return small_run[0]


def config(dense, **changes):
    return DistilConfig(str(dense), steps=20, eval_episodes=2, device="cpu", **changes)


def test_a_student_is_evenly_narrower_than_its_teacher(dense):
    taught = student.teach(config(dense, sparsity=0.5), "the command")
    model, teacher = taught.agent.model, load_agent(dense).model
    assert 0.5 <= taught.agent.size()["sparsity"] < 0.6
    share = [w / t for w, t in zip(model.widths.dynamics, teacher.widths.dynamics, strict=True)]
    assert max(share) - min(share) < 0.1
    assert len(taught.distilled) == 2 and "after 20 offline steps" in taught.sentence()
    kept = {name for name, own in teacher.state_dict().items() if own.numel() > 1}
    ours = model.state_dict()
    assert not any(
        torch.equal(ours[name], teacher.state_dict()[name])
        for name in kept
        if ours[name].shape == teacher.state_dict()[name].shape and ours[name].std() > 0
    )


def test_its_widths_can_be_given_and_it_is_an_ordinary_agent(dense, tmp_path):
    widths = ("encoder_width=5", "latent_width=3", "hidden_width=7")
    more = ("steps=5", "eval_episodes=2", "device=cpu", "save=student")
    done = run("distil.py", str(dense), *widths, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    agent = load_agent(tmp_path / "student")
    made = agent.model.widths
    assert (made.encoder, made.latent, made.dynamics, made.q_ensemble) == (
        *((5,), 3, (7, 7)),
        ((7, 7), (7, 7)),
    )
    said = agent.provenance["pruning"]
    assert (said["method"], said["offline_steps"]) == ("student", 5)
    assert "distil.py" in agent.provenance["commands"][-1]
    assert agent.parent.resolve() == load_agent(dense).folder.resolve()
    played = run("evaluate.py", "student", "episodes=1", cwd=tmp_path)
    assert played.returncode == 0, played.stderr
    again = run("distil.py", str(dense), *widths, *more, cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("hidden_width=17",), "would be larger than its teacher"),
        (("latent_width=7",), "would be larger than its teacher"),
        (("latent_width=1",), "latent_width=1 must be at least 2"),
        (("sparsity=1",), "sparsity=1.0 must lie in (0, 1)"),
        (("sparsity=0.999",), "cannot be reached"),
        (("sparsity=0.5", "hidden_width=4"), "sparsity=0.5 has no effect with hidden_width"),
        (("steps=0",), "steps=0 must be at least 1"),
    ],
)
def test_wrong_sizes_are_refused_in_one_line(dense, tmp_path, more, words):
    done = run("distil.py", str(dense), *more, "device=cpu", cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_pruned_agent_without_its_parent_teaches_nobody(pruned_run, tmp_path):
    pruned = load_agent(pruned_run[0] / "agents" / "step-1")
    save_agent(tmp_path / "orphan", replace(pruned, parent=None))
    done = run("distil.py", "orphan", "device=cpu", cwd=tmp_path)
    assert done.returncode == 2 and "dense parent is not there" in done.stderr


def test_the_dense_parent_of_a_pruned_agent_is_the_teacher(pruned_run, tmp_path):
    shutil.copytree(pruned_run[0], tmp_path / "run")
    taught = student.teach(config(tmp_path / "run", gather_episodes=2), "")
    assert taught.agent.parent.resolve() == (tmp_path / "run/agents/dense").resolve()
    assert load_agent(taught.agent.parent).is_dense
