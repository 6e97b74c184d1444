"""Agents exported to C: they compile as they are, decide as PyTorch does, and fit where they go."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tdmpc_prune.agent import deciding
from tdmpc_prune.agent.config import PlannerConfig
from tdmpc_prune.deploy import export as exporting
from tdmpc_prune.deploy import export_c, microcontroller
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.native import build
from tdmpc_prune.native.planner import Planner
from tdmpc_prune.saving.agents import load_agent, save_agent
from tests.commands import ROOT, run
from tests.test_native import STRICT, WIDTHS, random_agent

pytestmark = [
    pytest.mark.skipif(deciding.unavailable() is not None, reason="there is no C compiler"),
    pytest.mark.xdist_group("export c"),
]
PLANNER = PlannerConfig(horizon=3, iterations=2, samples=13, elites=4, policy_fraction=0.1)
KINDS = ["float32", "float16", "int8"]


@pytest.fixture(scope="module")
def agent():
    provenance = {"seed": 1, "env_steps": 0, "decisions": 0, "updates": 0}
    return replace(random_agent(replace(WIDTHS, action=1), PLANNER), provenance=provenance)


@pytest.fixture(scope="module", autouse=True)
def few_checks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "CHECKED", 50)
        yield


@pytest.fixture(scope="module")
def folders(agent, tmp_path_factory):
    """The exports of each part and type, without a proof in QEMU."""
    above = tmp_path_factory.mktemp("c")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microcontroller, "missing", lambda: ["a test's patience"])
        for part in ("planner", "policy"):
            for kind in KINDS:
                folder = above / f"{part}-{kind}"
                found[part, kind] = export_c.export_c(agent, part, folder, kind)
    return found


def make(folder, target, *flags):
    arguments = ["make", "-s", "-C", str(folder), target, f"CFLAGS={' '.join(flags)}"]
    return subprocess.run(arguments, capture_output=True, text=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["planner", "policy"])
def test_its_example_is_clean_and_decides_as_here(agent, folders, part, kind, tmp_path):
    """Without warnings, and under the address and undefined-behaviour sanitizers."""
    folder = tmp_path / "c"
    shutil.copytree(folders[part, kind].folder, folder)
    sanitizers = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    strict = [flag for flag in STRICT if flag.startswith("-W") or flag == "-pedantic"]
    done = make(folder, "main", "-O1", "-g", *strict, *sanitizers)
    assert done.returncode == 0, done.stderr
    observations = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    said = subprocess.run(
        [folder / "main"],
        input="\n".join(" ".join(f"{x:.9g}" for x in row) for row in observations),
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0 and not said.stderr, said.stderr
    planner = Planner(deciding.library(), export_c.stored(agent, kind), PLANNER, 0.99)
    for number, (line, observation) in enumerate(
        zip(said.stdout.splitlines(), observations, strict=True)
    ):
        planner.observation[:], planner.key.decision = observation, number
        planner.plan() if part == "planner" else planner.policy()
        np.testing.assert_allclose(
            [float(word) for word in line.split()], planner.action, atol=1e-4
        )
    refused = subprocess.run([folder / "main"], input="nan 0 0 0 0", capture_output=True, text=True)
    assert refused.returncode == 1 and "status 1" in refused.stderr


def test_the_loop_keeps_its_rate_and_says_so(folders):
    folder = folders["planner", "float32"].folder
    assert make(folder, "loop", "-O2", "-DRATE_HZ=20").returncode == 0
    said = subprocess.run([folder / "loop"], capture_output=True, text=True).stdout
    assert said.startswith("60 decisions at 20 Hz: ")


def test_the_description_says_what_a_program_needs(folders):
    done = folders["planner", "int8"]
    about = json.loads((done.folder / "agent.json").read_text())
    assert about["part"] == "planner" and about["weights"] == "int8"
    assert [port["name"] for port in about["inputs"]] == ["observation", "means"]
    assert about["action_limits"] == [[-1.0, 1.0]] and about["action_repeat"] == 8
    assert about["control_period_seconds"] == pytest.approx(0.08)
    sizes = {kind: folders["planner", kind].weights_kb for kind in KINDS}
    assert sizes["int8"] < sizes["float16"] < sizes["float32"]
    assert folders["policy", "int8"].weights_kb < sizes["int8"]


def test_commands(agent, folders, tmp_path):
    save_agent(tmp_path / "agent", agent)
    (tmp_path / "there").mkdir()
    folder = str(folders["planner", "float16"].folder)
    done = run("run_exported.py", folder, "1", cwd=tmp_path)
    assert done.returncode == 0 and "over 1 episode" in done.stdout, done.stderr
    given = ["export.py", "checkpoint=agent", "format=c"]
    for arguments, message in (
        ([*given, "out=there"], "'there' exists already"),
        ([*given, "weights=int4"], "weights=int4 must be float32, float16 or int8"),
        ([*given, "flash_kb=10"], "flash_kb=10 is too small by "),
        ([*given, "out=agent/agent.json/x"], "cannot be written"),
        (["export.py", "checkpoint=agent", "weights=int8"], "weights=int8 has no effect"),
        (["run_exported.py", "there"], "agent.json: it is needed"),
        (["run_exported.py", folder, "1", "walker-walk"], "takes observations of 5 numbers"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent", "there"]


def test_a_missing_compiler_is_one_line(agent, tmp_path, monkeypatch):
    monkeypatch.setattr(export_c, "unavailable", lambda: "there is no C compiler (cc, gcc, clang)")
    with pytest.raises(UserError, match="but there is no C compiler"):
        export_c.export_c(agent, "planner", tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_what_differs_is_not_saved(agent, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match="differs from PyTorch"):
        export_c.export_c(agent, "policy", tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_the_example_needs_no_pytorch(folders, tmp_path):
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['run_exported.py', {str(folders['planner', 'float32'].folder)!r}, '1']\n"
        f"runpy.run_path({str(ROOT / 'scripts/run_exported.py')!r}, run_name='__main__')\n"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def proofs(agent, folders):
    if missing := microcontroller.missing():
        pytest.skip(f"needs {missing}")
    return {kind: microcontroller.prove(folders["planner", kind].folder, agent) for kind in KINDS}


def exported(agent, tmp_path, monkeypatch, **changes):
    if missing := microcontroller.missing():
        pytest.skip(f"needs {missing}")
    boards = (replace(microcontroller.BOARDS[0], **changes),)
    monkeypatch.setattr(microcontroller, "BOARDS", boards)
    return export_c.export_c(agent, "planner", tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "measured", "why"),
    [
        ({"flags": ("-mcpu=none",)}, False, "arm-none-eabi-gcc fails: "),
        ({"machine": "none-such"}, True, "qemu-system-arm fails: "),
    ],
)
def test_without_a_proof_it_is_exported_and_says_why(
    agent, tmp_path, monkeypatch, changes, measured, why
):
    done = exported(agent, tmp_path, monkeypatch, **changes)
    assert done.proof is None and done.code_measured == measured
    assert f"no proof in QEMU: {why}" in done.text() and "\n" not in done.text()
    assert (done.folder / "weights.h").is_file()


def test_instructions_are_counted_however_often_the_timer_begins_anew(
    agent, folders, proofs, monkeypatch
):
    board = microcontroller.BOARDS[0]
    monkeypatch.setattr(
        microcontroller, "BOARDS", (replace(board, flags=(*board.flags, "-DTIMER_TOP=0x3ff")),)
    )
    (run,) = microcontroller.prove(folders["planner", "float32"].folder, agent).runs
    once = proofs["float32"].runs[0]
    assert run.million_instructions == pytest.approx(once.million_instructions, rel=0.02)
    assert run.bits == once.bits


@pytest.mark.parametrize("kind", KINDS)
def test_a_microcontroller_decides_as_this_machine(proofs, kind):
    """In QEMU: Cortex-M4F bit for bit, M7 within 1e-4."""
    four, seven = proofs[kind].runs
    assert four.bits == proofs[kind].bits and len(four.bits) >= 8
    assert proofs[kind].differences()[seven.board] <= 1e-4
    assert 0 < four.flash_kb < 20 and 0 < four.ram_kb < 5 and 0 < four.stack_kb < 2
    assert 0.01 < four.million_instructions < 5


def test_narrow_weights_cost_a_microcontroller_little_time_and_no_memory(proofs):
    for wide, *narrow in zip(*(proofs[kind].runs for kind in KINDS), strict=True):
        for one in narrow:
            assert one.million_instructions < 1.3 * wide.million_instructions
            assert one.flash_kb < wide.flash_kb and one.ram_kb <= wide.ram_kb


@pytest.mark.parametrize(
    "path",
    sorted(file.parent for file in (ROOT / "checkpoints").glob("*/agent.json")),
    ids=lambda path: path.name,
)
def test_every_shipped_agent_is_exported(path, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "CHECKED", 5 if path.name.endswith("dense") else 100)
    monkeypatch.setattr(microcontroller, "missing", lambda: ["a test's patience"])
    done = export_c.export_c(load_agent(path), "planner", tmp_path / "c", "float16")
    assert done.check.difference <= 1e-4 and done.check.jumps <= 5
    program = [build.compiler(), *build.STRICT, "-fsyntax-only", str(tmp_path / "c" / "main.c")]
    subprocess.run(program, check=True)
