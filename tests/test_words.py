"""What people read at a terminal: counts, spreads, tables that fit, and a run's log."""

import fcntl
import math
import os
import pty
import re
import struct
import sys
import termios

from tabulate import tabulate

from tdmpc_prune.words import counted, mean_and_std, narrowed, plus_minus
from tests.commands import ROOT, SMALL, run

PRUNE = [
    *("prune=bayesian", "prune.sparsity=0.5", "prune.steps=2", "prune.start=0.4"),
    *("prune.end=0.8", "prune.min_width=2", "prune.max_return_drop=10", "eval_episodes=1"),
]


def test_counts_and_spreads():
    assert counted(1, "episode") == "1 episode" and counted(0, "cut") == "0 cuts"
    assert counted(12_000, "env step") == "12,000 env steps"
    assert mean_and_std([852.34]) == "852.3" and mean_and_std([1, 3]) == "2.0 ± 1.0"
    assert plus_minus(852.34, math.nan, 2) == "852.34"


def test_wide_tables_are_narrowed_and_nothing_is_lost():
    names = ["task", "arm", "env steps", "planning MACs", "return (each run)", "parameters"]
    rows = [
        [
            *("cartpole-swingup", "bayesian prune.sparsity=0.9 prune.steps=3", "120,000"),
            *("1,234,567", ", ".join(str(i) for i in range(850, 870)), "12,345"),
        ]
    ] * 2
    table = tabulate(rows, names, "pipe", disable_numparse=True)
    text = f"before, however {'long ' * 40}it is\n\n{table}\n\nafter"
    narrow = narrowed(text)
    lines = [line for line in narrow.split("\n") if line.startswith("|")]
    assert {len(line) for line in lines} <= set(range(121)) and len({map(len, lines)}) == 1
    assert re.sub(r"[\s|:-]", "", narrow).startswith("before") and "12,345" in narrow
    for word in ("120,000", "1,234,567", "parameters"):  # numbers and heads stay whole
        assert word in narrow
    assert narrowed(text, 1000) == text
    many = tabulate([["word"] * 30], ["heading"] * 30, "pipe")
    assert narrowed(many).count("\n") > 3  # ugly, but there


def test_a_log_tells_the_run(tmp_path, undrawn):
    """Where stderr is no terminal there is no bar, and lines for all that happens."""
    done = run("train.py", *SMALL, *PRUNE, "run_dir=r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        r"gym:tests.synthetic:Reach-v0: [\d,]+ parameters on cpu to 120 env steps; "
        r"2 cuts to sparsity 0.5 at 72, 96 env steps",
        next(line for line in lines if "parameters on" in line),
    )
    assert sum(line.startswith("evaluation at ") for line in lines) == 2
    assert re.search(r"evaluation at 60 env steps: return -?[\d.]+ over 1 episode, ", done.stdout)
    for cut in ("cut 1 of 2 at 80 env steps: sparsity ", "cut 2 of 2 at 100 env steps: sparsity "):
        about = [line for line in lines if line.startswith(cut)]
        assert len(about) == 2 and "was asked for" in about[0] and about[1].endswith("kept")
    for wrong in ("nan", "1 episodes", "(s)"):
        assert wrong not in done.stdout
    done = run("train.py", "resume=r", "env_steps=140", cwd=tmp_path)
    assert "on cpu from 120 to 140 env steps; no cut is left" in done.stdout


def test_the_bar_fits_eighty_columns(tmp_path):
    """In a terminal of its own, gathering included."""
    run("train.py", *SMALL, "run_dir=dense", cwd=tmp_path)
    arguments = [*PRUNE, "checkpoint=dense", "env_steps=60", "run_dir=pruned"]
    arguments += ["prune.gather_updates=300", "device=cpu"]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, [sys.executable, str(ROOT / "scripts/prune.py"), *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end has gone
            break
    _, status = os.waitpid(child, 0)
    shown = shown.decode()
    assert status == 0, shown
    bars = [part for part in re.split(r"[\r\n]|\x1b\[A", shown) if "%|" in part]
    assert bars and max(map(len, bars)) <= 80
    assert any(re.search(r", gathering gradients \(\d+ of 300\)\]$", bar) for bar in bars), bars
    assert any(bar.endswith(", evaluating]") for bar in bars)
