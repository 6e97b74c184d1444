"""Runs that the release before began, stopped while the first cut recovers: they end as planned.

`data/before` was written by that release. Its numbers are of one machine, so that only what
follows from the plan is compared.
"""

import json
import shutil

import pytest

from tdmpc_prune.agent.config import LearningConfig
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.saving.agents import load_agent
from tdmpc_prune.saving.autoencoders import load_autoencoder
from tdmpc_prune.saving.run_folder import RunFolder
from tests.commands import ROOT, run

BEFORE = ROOT / "tests" / "data" / "before"
LOAD = {
    "agent": lambda run: load_agent(run).model,
    "autoencoder": lambda run: load_autoencoder(run).model,
}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["agent", "autoencoder"])
def test_what_was_saved_before_is_loaded(kind):
    run_dir, load = BEFORE / kind, LOAD[kind]
    before = files(run_dir)
    plan = Plan.load(run_dir / "plans" / "step-1.json")
    dense, cut = load(run_dir / "agents" / "dense"), load(run_dir)
    (said,) = RunFolder(run_dir).read_history("cut")
    assert size(cut) == said["parameters"] < size(dense)
    assert plan.sparsity == said["target"]
    assert files(run_dir) == before


@pytest.mark.parametrize(
    ("kind", "script", "unit", "cuts", "evaluations", "sparsity"),
    [
        ("agent", "train.py", "env_steps", [80, 120, 160], [60, 120, 180, 200], 0.7),
        ("autoencoder", "train_autoencoder.py", "updates", [20, 28, 36], [20, 40, 60], 0.6),
    ],
)
def test_a_run_begun_before_goes_on_to_its_end(
    tmp_path, kind, script, unit, cuts, evaluations, sparsity
):
    folder = shutil.copytree(BEFORE / kind, tmp_path / "run")
    begun = (folder / "history.jsonl").read_text()
    kept = files(folder / "agents" / "dense") | files(folder / "plans")
    done = run(script, "resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    after = (folder / "history.jsonl").read_text()
    assert after.startswith(begun)  # it goes on line by line
    moments = [line[unit] for line in map(json.loads, after.splitlines()) if unit in line]
    assert moments == sorted(moments) and moments[-1] == evaluations[-1]
    assert [line[unit] for line in RunFolder(folder).read_history("evaluation")] == evaluations
    episodes = [line["env_steps"] for line in RunFolder(folder).read_history("episode")]
    assert episodes == (list(range(20, 201, 20)) if kind == "agent" else [])

    assert [cut[unit] for cut in RunFolder(folder).read_history("cut")] == cuts
    steps = RunFolder(folder).read_history("pruning step")
    assert [(step["step"], step["cut_at"]) for step in steps] == [*enumerate(cuts, 1)]
    assert all(step["kept"] and step["sparsity"] >= step["target"] for step in steps)
    # What was measured before the stop belongs to the step that ends after it.
    tracked = RunFolder(folder).read_history("tracking")
    for moment, entry in zip(("before", "after"), tracked, strict=False):
        assert (entry["moment"], entry["step"]) == (moment, 1)
        assert steps[0][moment]["mean"] == entry["mean"]

    last = RunFolder(folder).read_history("evaluation")[-1]
    assert sparsity <= last["sparsity"] < sparsity + 0.1
    assert size(LOAD[kind](folder)) == last["parameters"]
    for number, step in enumerate(steps, 1):
        assert size(LOAD[kind](folder / "agents" / f"step-{number}")) == step["parameters"]
    assert {path: path.read_bytes() for path in kept} == kept


def test_an_older_run_explores_as_it_began():
    """Settings that there were not yet mean what was done then, not the default of today."""
    learning = load_agent(BEFORE / "agent").config.learning
    assert (learning.exploration, learning.curiosity) == ("white", 0)
    assert (learning.cooldown, learning.scale_observations) == (0, False)
    assert (LearningConfig().exploration, LearningConfig().curiosity) != ("white", 0)
