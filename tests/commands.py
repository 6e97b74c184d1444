"""Running a command as a person types it: in this process, or in one of its own.

A command in this process costs no second interpreter and no second import of PyTorch. What it might
leave behind (working directory, arguments, environment, threads, Hydra's state) is put back; the
choices that it has declared to Hydra stay.
"""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import absl.logging
import torch
from hydra.core.global_hydra import GlobalHydra

# Hydra closes every log handler, and that of absl (dm_control's) would close pytest's stderr, too.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

ROOT = Path(__file__).parents[1]
REACH = "task=gym:tests.synthetic:Reach-v0"
SMALL = [
    REACH,
    "env_steps=120",
    "eval_every=60",
    "eval_episodes=2",
    "device=cpu",
    "model.network.encoder_width=12",
    "model.network.latent_width=6",
    "model.network.hidden_width=16",
    "model.planner.samples=24",
    "model.planner.elites=6",
    "model.learning.seed_decisions=40",
    "model.learning.batch=16",
]


@dataclass(frozen=True)
class Done:
    """What a finished command left."""

    returncode: int
    stdout: str
    stderr: str


def run(script, *arguments, cwd) -> Done:
    """Run `scripts/<script>` here."""
    out, errors = io.StringIO(), io.StringIO()
    before = sys.argv, dict(os.environ), torch.get_num_threads()
    code = 0
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            os.environ["PYTHONPATH"] = str(ROOT)  # for the processes of launchers
            sys.argv = [str(ROOT / "scripts" / script), *arguments]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
        torch.set_num_threads(before[2])
        GlobalHydra.instance().clear()
    return Done(code, out.getvalue(), errors.getvalue())


def run_process(script, *arguments, cwd, **environment) -> subprocess.CompletedProcess:
    """Run `scripts/<script>` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
