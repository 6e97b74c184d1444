"""The program `tdmpc-prune`, in a checkout and as a wheel brings it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tdmpc_prune import program
from tests.commands import ROOT

TINY = ["task=gym:Pendulum-v1", "env_steps=200", "eval_every=200", "eval_episodes=1", "device=cpu"]
TINY += ["model.network.encoder_width=12", "model.network.latent_width=6"]
TINY += ["model.network.hidden_width=16", "model.planner.samples=24", "model.planner.elites=6"]
TINY += ["model.learning.seed_decisions=190", "model.learning.updates_per_decision=0.05"]


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tdmpc-prune", *arguments])
    main = sys.modules["__main__"]
    try:
        program.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.modules["__main__"] = main
    return 0


def test_help_lists_the_commands_in_the_order_of_the_readme(monkeypatch, capsys):
    assert called(monkeypatch, "--help") == 0
    listed = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    table = (ROOT / "README.md").read_text().split("\n## Commands\n")[1].split("\n## ")[0]
    assert listed == re.findall(r"^\| `(\w+)\.py` \|", table, re.MULTILINE)
    assert called(monkeypatch) == 0 and "usage: tdmpc-prune" in capsys.readouterr().out


def test_a_commands_help_is_as_it_is_typed(monkeypatch, capsys):
    assert called(monkeypatch, "export", "--help") == 0
    shown = capsys.readouterr().out
    assert "usage: tdmpc-prune export [<checkpoint>]" in shown and "python" not in shown
    assert called(monkeypatch, "run-exported", "--help") == 0
    assert "usage: tdmpc-prune run_exported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["xyz"], "unknown command 'xyz'; tdmpc-prune --help lists them"),
        (["task=cartpole-swingup"], "unknown command 'task=cartpole-swingup'"),
        (["train", "sede=3"], "unknown setting 'sede'; did you mean seed"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, capsys, arguments, message):
    assert called(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


# --- Installed --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a distribution is made of."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("envs", "scripts", "tdmpc_prune"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    return folder


def sh(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed(folder, what, *options):
    """A new environment with `what` in it, which borrows all else from the present one."""
    sh(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    packages = sh(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd="/")
    with open(f"{packages.strip()}/borrowed.pth", "w") as paths:
        paths.write(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    sh(*pip, "--no-deps", "--no-index", "--no-build-isolation", *options, what, cwd="/")
    return folder / "bin"


@pytest.mark.slow  # builds a wheel and starts an interpreter for every command
def test_a_wheel_trains_evaluates_and_exports_outside_of_the_checkout(tmp_path, checkout):
    pytest.importorskip("onnxruntime")
    build = ("wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path)
    sh(sys.executable, "-m", "pip", *build, checkout, cwd="/")
    (wheel,) = tmp_path.glob("*.whl")
    bin = installed(tmp_path / "venv", wheel)
    work = tmp_path / "work"
    work.mkdir()
    where = (
        "import tdmpc_prune, importlib.util as u; print(tdmpc_prune.__file__, u.find_spec('envs'))"
    )
    file, top_level = sh(bin / "python", "-c", where, cwd=work).split()
    assert file.startswith(str(tmp_path / "venv")) and top_level == "None"

    run = work / "runs/gym-Pendulum-v1/none/seed1"
    said = sh(bin / "tdmpc-prune", "train", *TINY, cwd=work)
    assert f"tdmpc-prune evaluate checkpoint={run.relative_to(work)}" in said
    said = sh(bin / "tdmpc-prune", "evaluate", run, "episodes=1", cwd=work)
    assert "return (mean ± std)" in said
    sh(bin / "tdmpc-prune", "compare", run, "--published", "--out", "returns", cwd=work)
    assert (work / "returns.csv").is_file()
    sh(bin / "tdmpc-prune", "export", run, "part=policy", "out=policy.onnx", cwd=work)
    assert (work / "policy.onnx.json").is_file()
    said = sh(bin / "tdmpc-prune", "run_exported", "policy.onnx", "1", cwd=work)
    assert "over 1 episode" in said


@pytest.mark.slow  # builds, and starts an interpreter for every command
def test_an_editable_installation_is_the_checkout(tmp_path, checkout):
    bin = installed(tmp_path / "venv", checkout, "-e")
    where = "from tdmpc_prune import envs, load; print(envs.__file__, envs.make_env.__module__)"
    file, module = sh(bin / "python", "-c", where, cwd=tmp_path).split()
    assert file == str(checkout / "envs/__init__.py") and module == "tdmpc_prune.envs.make"
    assert "usage: tdmpc-prune" in sh(bin / "tdmpc-prune", cwd=tmp_path)
