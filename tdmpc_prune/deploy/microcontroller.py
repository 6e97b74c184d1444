"""An exported agent on a Cortex-M, in QEMU: what it takes, and that it decides as here.

QEMU counts instructions and bytes; it is no silicon. Milliseconds at a clock rate are estimates.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.native import build

COMPILER, EMULATOR = "arm-none-eabi-gcc", "qemu-system-arm"
ESTIMATED_CODE_KB = 12.5  # of the planner with an example around it, for a Cortex-M4F
_SECONDS = 120
_DECISIONS = 8
_TICK = 40  # instructions: 25 MHz of a processor that takes a nanosecond for each
_FLAGS = ("-O2", "-mthumb", "-mfloat-abi=hard", "-ffp-contract=off", "-fno-math-errno")


class Unproven(Exception):
    """Why a program was not tried in QEMU: a clause."""


@dataclass(frozen=True)
class Board:
    """A processor that QEMU emulates."""

    name: str
    flags: tuple[str, ...]
    machine: str
    clock_mhz: int  # of a usual part with it
    cycles: float  # per instruction, of code like this on it, for the estimate in milliseconds


BOARDS = (
    Board("Cortex-M4F", ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16"), "mps2-an386", 168, 1.2),
    Board("Cortex-M7", ("-mcpu=cortex-m7", "-mfpu=fpv5-d16"), "mps2-an500", 480, 1.0),
)


@dataclass(frozen=True)
class Run:
    """Chained decisions on a board."""

    board: str
    flash_kb: float  # units of 1000 bytes
    ram_kb: float  # static
    stack_kb: float  # the deepest
    million_instructions: float  # per decision, median
    estimated_ms: float
    estimated_at_mhz: int
    bits: list[list[int]]  # per decision: actions and means, as float32's bits

    def text(self) -> str:
        return (
            f"{self.board} in QEMU: {self.flash_kb:.1f} KB of flash, {self.ram_kb:.1f} KB of RAM, "
            f"{self.stack_kb:.1f} KB of stack, {self.million_instructions:.2f} million "
            f"instructions per decision (estimate: {self.estimated_ms:.1f} ms at "
            f"{self.estimated_at_mhz} MHz)"
        )


@dataclass(frozen=True)
class Proof:
    """The boards beside this machine's plain build."""

    runs: list[Run]
    bits: list[list[int]]  # this machine's

    def differences(self) -> dict[str, float]:
        """Board → largest difference of an action or a mean; 0 means equal bit for bit."""
        own = _floats(self.bits)
        return {run.board: float(np.abs(_floats(run.bits) - own).max()) for run in self.runs}

    def text(self) -> str:
        found = self.differences()

        def like(run: Run) -> str:
            same = run.bits == self.bits
            return "this machine's, bit for bit" if same else f"off by {found[run.board]:.1e}"

        return "\n".join(f"{run.text()}; its decisions are {like(run)}" for run in self.runs)

    def as_json(self) -> list[dict[str, Any]]:
        found = self.differences()
        runs = []
        for run in self.runs:
            values = {name: value for name, value in asdict(run).items() if name != "bits"}
            same = run.bits == self.bits
            runs.append(values | {"bit_equal": same, "largest_difference": found[run.board]})
        return runs


def missing() -> list[str]:
    """The tools that are not installed: a cross-compiler and an emulator are needed."""
    return [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]


def code_kb() -> float:
    """What the planner's code takes on a Cortex-M4F, in units of 1000 bytes.

    Raises:
        Unproven: a tool is not installed, or fails.
    """
    if tools := missing():
        raise Unproven(f"{' or '.join(tools)} is missing")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "planner.o"
        command = [COMPILER, "-std=c99", *_FLAGS, *BOARDS[0].flags, "-c", str(build.SOURCES[1])]
        _run([*command, "-o", str(target)])
        text, data, _ = _sizes(target)
    return (text + data) / 1000


def prove(folder: Path, agent: Agent) -> Proof:
    """Run an exported folder on every board, and on this machine built as plainly.

    Raises:
        Unproven: a tool fails, as it does with what is too large or too slow for a board.
    """
    observations = np.random.default_rng(0).normal(
        size=(_DECISIONS, agent.model.widths.observation)
    )
    observations = observations.astype(np.float32)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        (work / "trial.h").write_text(_trial(observations))
        runs = [_on(board, folder, work) for board in BOARDS]
        return Proof(runs, _here(folder, work))


def _trial(observations: np.ndarray) -> str:
    rows = ["{" + ", ".join(float(x).hex() + "f" for x in row) + "}," for row in observations]
    return (
        f"#define TRIAL_DECISIONS {len(observations)}\n"
        f"static const float trial_observations[TRIAL_DECISIONS][AGENT_OBSERVATION] = {{\n"
        + "\n".join(rows)
        + "\n};\n"
    )


def _on(board: Board, folder: Path, work: Path) -> Run:
    firmware = build.SOURCES[0].with_name("firmware")
    image = work / "firmware.elf"
    _run(
        [
            *(COMPILER, "-std=gnu99", *_FLAGS, *board.flags, "-ffunction-sections"),
            *("-nostartfiles", "-Wl,--gc-sections", f"-T{firmware / 'firmware.ld'}"),
            *(f"-I{folder}", f"-I{work}", str(firmware / "firmware.c"), str(folder / "planner.c")),
            *("--specs=nosys.specs", "-o", str(image)),
        ]
    )
    text, data, bss = _sizes(image)
    said = _run(
        [
            *(EMULATOR, "-machine", board.machine, "-nographic", "-monitor", "none"),
            *("-serial", "none", "-icount", "shift=0", "-semihosting-config"),
            *("enable=on,target=native", "-kernel", str(image)),
        ]
    )
    lines = [line.split() for line in said.splitlines()]
    numbers = [[int(word, 16) for word in words] for kind, *words in lines if kind == "decision"]
    stack = next((int(words[0], 16) for kind, *words in lines if kind == "stack"), None)
    if len(numbers) != _DECISIONS or stack is None:
        raise Unproven(f"{EMULATOR} did not run it to its end: {' '.join(said.split())[-80:]}")
    instructions = _TICK * float(np.median([ticks for ticks, *_ in numbers])) / 1e6
    return Run(
        board.name,
        (text + data) / 1000,
        (data + bss) / 1000,
        stack / 1000,
        instructions,
        1000 * instructions * board.cycles / board.clock_mhz,
        board.clock_mhz,
        [bits for _, *bits in numbers],
    )


_HARNESS = """
#include <stdio.h>
#include <string.h>
#include "weights.h"
#include "agent.h"
#include "trial.h"
static agent_control control;
static void show(const float *x, int count)
{
    for (int i = 0; i < count; i++) {
        unsigned bits;
        memcpy(&bits, x + i, 4);
        printf("%08x ", bits);
    }
}
int main(void)
{
    float action[AGENT_ACTION];
    for (int i = 0; i < TRIAL_DECISIONS; i++) {
        if (agent_act(&control, trial_observations[i], action) != PLANNER_OK)
            return 1;
        show(action, AGENT_ACTION);
        show(control.means[0], AGENT_MEANS * AGENT_ACTION);
        printf("\\n");
    }
    return 0;
}
"""


def _here(folder: Path, work: Path) -> list[list[int]]:
    """The same decisions by this machine's plain build."""
    (work / "here.c").write_text(_HARNESS)
    program = work / "here"
    flags = [*build.STRICT, "-O2", "-DPLANNER_WIDTH=1", f"-I{folder}", f"-I{work}"]
    sources = [str(work / "here.c"), str(folder / "planner.c")]
    _run([build.compiler(), *flags, *sources, "-o", str(program)])
    return [[int(word, 16) for word in line.split()] for line in _run([str(program)]).splitlines()]


def _floats(bits: list[list[int]]) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


def _sizes(binary: Path) -> tuple[int, int, int]:
    """Bytes of text, data and bss."""
    line = _run(["arm-none-eabi-size", str(binary)]).splitlines()[1]
    text, data, bss, *_ = map(int, line.split()[:3])
    return text, data, bss


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except OSError as error:
        raise Unproven(f"{command[0]} cannot be run ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise Unproven(f"{command[0]} takes longer than {_SECONDS} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise Unproven(f"{Path(command[0]).name} fails: {said[0]}")
    return done.stdout + done.stderr  # QEMU writes to either
