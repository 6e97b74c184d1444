"""Checkpoints of the public TD-MPC code: the same outputs, an agent like any other, or one line."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

from tdmpc_prune import load_agent
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.deploy.importing import read_public
from tdmpc_prune.saving.agents import load_target
from tests.commands import REACH, ROOT, SMALL, run

GIVEN = ROOT.parent / "shared/tdmpc-checkpoints"
THEIRS = {"encoder": "_encoder", "dynamics": "_dynamics", "reward": "_reward", "policy": "_pi"}
SETTINGS = [s for s in SMALL if s.startswith(("model.planner", "model.learning"))]


def public_state(seed, widths=None):
    """A state dict under the public code's names, of networks with the widths of `SMALL`."""
    widths = widths or Widths(3, 1, 6, (12,), (16, 16), (16, 16), (16, 16), ((16, 16),) * 2)
    model = WorldModel(widths, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    state = {}
    for name, weight in model.state_dict().items():
        component, _, rest = name.partition(".")
        if component == "q_ensemble":
            member, _, rest = rest.partition(".")
            component = f"_Q{int(member) + 1}"
        else:
            component = THEIRS[component]
        state[f"{component}.{rest}"] = weight + 0.01 * torch.randn_like(weight)
    return state


@pytest.fixture(scope="module")
def size():
    from tdmpc_prune.envs import make_env

    env = make_env(REACH.removeprefix("task="))
    return env.observation_space.shape[0], env.action_space.shape[0]


@pytest.fixture
def public_file(tmp_path, size):
    widths = Widths(*size, 6, (12,), (16, 16), (16, 16), (16, 16), ((16, 16),) * 2)
    states = {"model": public_state(1, widths), "model_target": public_state(2, widths)}
    torch.save(states, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.skipif(not GIVEN.is_dir(), reason="needs ../shared/tdmpc-checkpoints")
@pytest.mark.parametrize("name", ["tdmpc-cartpole-swingup", "tdmpc-walker-walk"])
def test_the_outputs_are_those_of_the_public_code(name):
    model, target = read_public(GIVEN / f"{name}.pt")
    expected = load_file(GIVEN / f"{name}.expected.safetensors")
    observation, action = expected.pop("observation"), expected.pop("action")
    with torch.no_grad():
        latent = model.encode(observation)
        (q1, q2), target_latent = model.q_values(latent, action), target.encode(observation)
        found = {
            "latent": latent,
            "next_latent": model.next_latent(latent, action),
            "reward": model.predict_reward(latent, action).unsqueeze(-1),
            "q1": q1.unsqueeze(-1),
            "q2": q2.unsqueeze(-1),
            "policy_action": model.act(latent),
        }
        of_target = target.q_values(target_latent, action)
        found |= {f"target_q{i}": q.unsqueeze(-1) for i, q in enumerate(of_target, 1)}
    assert set(found) == set(expected)
    for output, value in found.items():
        assert (value - expected[output]).abs().max() <= 1e-5, output


def test_an_imported_agent_evaluates_is_pruned_and_trains_on(tmp_path, public_file, undrawn):
    done = run("import.py", "model.pt", REACH, *SETTINGS, "out=theirs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    agent = load_agent(tmp_path / "theirs")
    wanted = torch.load(public_file, weights_only=True)
    assert torch.equal(agent.model.encoder[0].weight, wanted["model"]["_encoder.0.weight"])
    targets = load_target(agent)
    assert torch.equal(targets["policy.4.bias"], wanted["model_target"]["_pi.4.bias"])
    assert agent.is_dense and agent.interface.observation
    assert agent.provenance["imported"]["counts"] == "assumed"

    done = run("evaluate.py", "theirs", "episodes=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cut = ["prune.steps=1", "prune.sparsity=0.4", "prune.min_width=2", "prune.round_to=1"]
    cut += ["prune.max_return_drop=10", "prune.gather_updates=3", "prune.gather_episodes=1"]
    few = ["env_steps=40", "eval_every=40", "eval_episodes=1", "prune.eval_episodes=1"]
    done = run("prune.py", "theirs", *cut, *few, "run_dir=cut", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_agent(tmp_path / "cut").size()["sparsity"] >= 0.4

    steps = agent.provenance["env_steps"] + 40
    (typed,) = [line for line in run_lines(done_import(tmp_path)) if "train it on" in line]
    arguments = [part for part in typed.split("train.py ")[1].split() if "env_steps" not in part]
    more = [f"env_steps={steps}", "eval_every=40", "eval_episodes=1", "run_dir=longer"]
    done = run("train.py", *arguments, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def done_import(tmp_path):
    return run("import.py", "model.pt", REACH, *SETTINGS, "out=again", cwd=tmp_path)


def run_lines(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def of_tdmpc2():
    return {"_encoder.state.0.ln.weight": torch.ones(4), "_Qs.params.0": torch.ones(4)}


def of_pictures():
    return public_state(1) | {"_encoder.1.weight": torch.zeros(32, 9, 7, 7)}


def with_state(**changes):
    return lambda: {"model": public_state(1) | changes, "model_target": public_state(2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {"model": of_tdmpc2()}, "is a TD-MPC2 checkpoint, which is not supported yet"),
        (of_tdmpc2, "is a TD-MPC2 checkpoint"),
        (lambda: {"model": of_pictures(), "model_target": of_pictures()}, "learnt from pictures"),
        (lambda: {"model": public_state(1), "x": RunsCode()}, "could run code"),
        (lambda: {"weights": torch.ones(3)}, "no TD-MPC checkpoint: it has no 'model_target'"),
        (lambda: {"epoch": 3, "state": {}}, "expected are the keys 'model' and 'model_target'"),
        (lambda: torch.ones(3), "it holds Tensor"),
        (lambda: {"model": public_state(1)}, "it has no 'model_target'"),
        (with_state(**{"_head.weight": torch.ones(3)}), "it has weights '_head.weight'"),
        (with_state(**{"_pi.0.bias": torch.full((16,), torch.nan)}), "not finite numbers"),
        (with_state(**{"_pi.0.bias": torch.ones(7)}), "no TD-MPC checkpoint: "),
        (
            lambda: {"model": {"_encoder.0.weight": torch.ones(3, 3)}, "model_target": {}},
            "it has no 'model_target'",
        ),
        (
            lambda: {key: {"_encoder.0.bias": torch.ones(3)} for key in ("model", "model_target")},
            "no TD-MPC checkpoint: ",
        ),
    ],
)
def test_what_is_none_is_refused_in_one_line(tmp_path, content, message):
    torch.save(content(), tmp_path / "model.pt")
    done = run("import.py", "file=model.pt", REACH, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and message in line and "model.pt" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_plain_pickle_is_not_run(tmp_path, protocol):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"model": RunsCode()}, protocol))
    done = run("import.py", "model.pt", REACH, cwd=tmp_path)
    assert done.returncode == 2 and "could run code" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"hello there"), "torch.save has not made it"),
        (lambda path: path.write_bytes(b""), "torch.save has not made it"),
        (lambda path: path.mkdir(), "is a folder; give the .pt file"),
        (lambda path: None, "does not exist; give the .pt file"),
    ],
)
def test_what_is_no_such_file_is_one_line(tmp_path, make, message):
    make(tmp_path / "model.pt")
    done = run("import.py", "model.pt", REACH, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and message in line


def test_another_task_and_a_taken_folder_are_refused(tmp_path, public_file):
    done = run("import.py", "model.pt", "task=walker-walk", cwd=tmp_path)
    assert done.returncode == 2 and "but task 'walker-walk' has 24 and 6" in done.stderr
    done = run("import.py", "model.pt", REACH, "out=.", cwd=tmp_path)
    assert done.returncode == 2 and "exists already" in done.stderr
    done = run("import.py", "model.pt", cwd=tmp_path)
    assert done.returncode == 2 and "task=" in done.stderr
