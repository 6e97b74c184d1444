"""Exported graphs: the same numbers as PyTorch, no PyTorch to run them, and clear refusals."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.config import AgentConfig, PlannerConfig
from tdmpc_prune.agent.planner import PlannerNoise, drawn, first_means, plan
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.deploy import export as exporting
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.saving.agents import load_agent, save_agent
from tests.commands import ROOT, run

pytestmark = pytest.mark.xdist_group("export")  # they share two graphs

POLICY = "cartpole-swingup-policy.onnx"
PLANNER = PlannerConfig(horizon=3, iterations=2, samples=24, elites=6)


@pytest.fixture(scope="module")
def agent():
    """A pruned structure with weights that make no two values alike."""
    widths = Widths(5, 1, 6, (10,), (12, 7), (5, 8), (9, 4), ((6, 7), (8, 5)))
    model = WorldModel(widths)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    config = replace(AgentConfig(), planner=PLANNER)
    provenance = {"seed": 1, "env_steps": 0, "decisions": 0, "updates": 0}
    return Agent(model, config, "cartpole-swingup", 8, provenance)


@pytest.fixture(scope="module")
def graphs(agent, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    return {p: exporting.export(agent, p, folder / f"{p}.onnx") for p in ("planner", "policy")}


@pytest.mark.parametrize("part", ["planner", "policy"])
def test_an_export_agrees_with_pytorch_and_says_how_to_use_it(graphs, part):
    done = graphs[part]
    assert done.difference <= 1e-4
    about = json.loads(done.sidecar.read_text())
    assert about["largest_difference_to_pytorch"] == done.difference
    assert about["of_these_decided_by_rounding"] == done.jumps <= 10
    assert about["sha256"] == hashlib.sha256(done.graph.read_bytes()).hexdigest()
    assert about["control_period_seconds"] == pytest.approx(0.08) and about["action_repeat"] == 8
    assert about["observation"] == [
        {"name": "position", "size": 3},
        {"name": "velocity", "size": 2},
    ]
    session = onnxruntime.InferenceSession(done.graph)
    for ports, described in (
        (session.get_inputs(), about["inputs"]),
        (session.get_outputs(), about["outputs"]),
    ):
        assert [(p.name, p.shape) for p in ports] == [(p["name"], p["shape"]) for p in described]
    assert sorted(path.name for path in done.graph.parent.iterdir()) == [
        *("planner.onnx", "planner.onnx.json", "policy.onnx", "policy.onnx.json")
    ]


def test_a_whole_episode_of_decisions_is_the_same(agent, graphs):
    """Closed loop over the means: differences would grow."""
    session = onnxruntime.InferenceSession(graphs["planner"].graph)
    about = json.loads(graphs["planner"].sidecar.read_text())
    rng = np.random.default_rng(0)
    means = first_means(PLANNER, 1, 1)
    fed_back = means.squeeze(1).numpy()
    for _ in range(50):
        observation = rng.normal(size=5).astype(np.float32)
        noise = {
            port["name"]: (rng.random if port["draw"] == "uniform" else rng.standard_normal)(
                port["shape"]
            ).astype(np.float32)
            for port in about["inputs"]
            if "draw" in port
        }
        tensors = [torch.from_numpy(value) for value in noise.values()]
        ours = plan(
            agent.model,
            torch.from_numpy(observation)[None],
            means,
            PlannerNoise(*tensors, torch.zeros(1, 1)),
            PLANNER,
            agent.config.learning.discount,
        )
        means = ours.means
        inputs = {"observation": observation, "means": fed_back} | noise
        action, fed_back = session.run(None, inputs)
        np.testing.assert_allclose(action, ours.actions[0], atol=1e-4)
        np.testing.assert_allclose(fed_back, ours.means[:, 0], atol=1e-4)


def test_the_example_needs_no_pytorch(graphs, tmp_path):
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['run_exported.py', {str(graphs['planner'].graph)!r}, '1']\n"
        f"runpy.run_path({str(ROOT / 'scripts/run_exported.py')!r}, run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "over 1 episode" in done.stdout


def test_commands(agent, tmp_path):
    save_agent(tmp_path / "agent", agent)
    done = run("export.py", "checkpoint=agent", "part=policy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cartpole-swingup-policy.onnx" in done.stdout
    done = run("run_exported.py", "cartpole-swingup-policy.onnx", "1", cwd=tmp_path)
    assert done.returncode == 0 and "over 1 episode" in done.stdout, done.stderr
    for script, arguments, message in (
        ("run_exported.py", [POLICY, "1", "walker-walk"], "takes observations of 5 numbers"),
        ("run_exported.py", ["gone.onnx"], "must both be there"),
        ("run_exported.py", [POLICY, "1", "cartpole-swngup"], "unknown task"),
        ("export.py", ["checkpoint=agent", "format=tflite"], "format=tflite is not known"),
        ("export.py", ["checkpoint=agent", "part=encoder"], "part=encoder must be"),
        ("export.py", ["checkpoint=agent", "out=x.pb"], "out=x.pb must end in .onnx"),
        ("export.py", ["checkpoint=agent", "out=no/x.onnx"], "cannot be written"),
    ):
        done = run(script, *arguments, cwd=tmp_path)
        assert done.returncode in (1, 2)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("agent", "cartpole-swingup-policy.onnx", "cartpole-swingup-policy.onnx.json")
    ]


def test_a_graph_that_differs_is_not_saved(agent, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    monkeypatch.setattr(exporting, "CHECKED", 3)
    with pytest.raises(RunError, match="differs from PyTorch"):
        exporting.export(agent, "policy", tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


def test_an_export_into_a_checkpoint_leaves_it_whole(agent, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "CHECKED", 3)
    save_agent(tmp_path / "agent", agent)
    exporting.export(agent, "policy", tmp_path / "agent" / "agent.onnx")
    load_agent(tmp_path / "agent")
    (tmp_path / "taken.onnx.json").mkdir()
    with pytest.raises(RunError, match="it is a folder"):
        exporting.export(agent, "policy", tmp_path / "taken.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent", "taken.onnx.json"]


@pytest.mark.parametrize("change", [3e-3, np.nan])
def test_a_planner_that_differs_is_not_saved(agent, tmp_path, monkeypatch, change):
    class Wrong:
        def __init__(self, *arguments):
            self.session = session_of(*arguments)

        def run(self, names, fed):
            action, means = self.session.run(names, fed)
            return [action + np.float32(change), means]

    session_of = exporting._session
    monkeypatch.setattr(exporting, "_session", Wrong)
    monkeypatch.setattr(exporting, "CHECKED", 20)
    with pytest.raises(RunError, match=r"differs from PyTorch by .*, and not by rounding"):
        exporting.export(agent, "planner", tmp_path / "planner.onnx")
    assert not list(tmp_path.iterdir())


def test_ties_are_told_from_a_wrong_graph_by_the_planners_own_margins(agent):
    """For sure, each kind: at the last elite, beside the executed one, and in the draw."""
    planner = replace(PLANNER, iterations=1, policy_fraction=0.0)
    agent = replace(agent, config=replace(agent.config, planner=planner))
    step = exporting.PlannerStep(agent)
    ports, _ = exporting.ports_of(agent, "planner")
    names = [port.name for port in ports]
    samples, ends = names.index("noise_samples"), names.index("noise_sample_ends")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        inputs = exporting.draw_inputs(ports, generator)
        decision = step.decide(*inputs)
        assert not step.hangs_on_rounding(inputs, 1.0)
        ranked = decision.values[0][0].argsort(descending=True)
        executed = int(drawn(decision.scores.cumsum(1), inputs[-1]))
        for rank in {planner.elites - 1, executed}:
            tie = [part.clone() for part in inputs]
            for part in (tie[samples], tie[ends]):  # [..., N, A]
                part[..., ranked[rank + 1], :] = part[..., ranked[rank], :]
            assert step.hangs_on_rounding(tie, 1.0)
        between = [*inputs[:-1], decision.scores.cumsum(1)[:, 2] + 1e-8]
        assert step.hangs_on_rounding(between, 1.0)


@pytest.mark.parametrize(
    "planner",
    [
        replace(PLANNER, policy_fraction=0.0),
        replace(PLANNER, policy_fraction=0.0, elites=24),
        replace(PLANNER, elites=1, iterations=1, horizon=1),
    ],
    ids=["no policy trajectories", "all are elites", "smallest"],
)
def test_planners_of_any_size(agent, planner, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "CHECKED", 20)
    agent = replace(agent, config=replace(agent.config, planner=planner))
    done = exporting.export(agent, "planner", tmp_path / "planner.onnx")
    session = onnxruntime.InferenceSession(done.graph)
    about = json.loads(done.sidecar.read_text())
    given = [(port.name, port.shape) for port in session.get_inputs()]
    assert given == [(port["name"], port["shape"]) for port in about["inputs"]]


# A dense agent takes 0.1 s to decide: with -m slow.
SHIPPED = [
    pytest.param(path, id=path.name, marks=[pytest.mark.slow] * path.name.endswith("-dense"))
    for path in sorted(file.parent for file in (ROOT / "checkpoints").glob("*/agent.json"))
]


@pytest.mark.parametrize("path", SHIPPED)
def test_every_shipped_agent_is_exported(path, tmp_path, monkeypatch):
    # All observations for the smallest planner; the others take their time.
    checked = (
        1000 if path.name == "cartpole-swingup-fitted" else 20 if "dense" in path.name else 100
    )
    monkeypatch.setattr(exporting, "CHECKED", checked)
    done = exporting.export(load_agent(path), "planner", tmp_path / "planner.onnx")
    assert done.difference <= 1e-4 and done.jumps <= 0.05 * checked


def test_the_extra_is_named_when_it_is_missing(agent, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'tdmpc-prune\[onnx\]'"):
        exporting.export(agent, "policy", tmp_path / "policy.onnx")
