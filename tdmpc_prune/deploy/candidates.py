"""Every way to decide with an agent, timed in turn: PyTorch, ONNX Runtime, C, and its dense parent.

Cold: each decides once per round, the others between. Warm: blocks of ten decisions. CPU time of
the deciding thread is what can be compared on a busy machine; wall time is what a robot sees.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.controller import Controller
from tdmpc_prune.agent.deciding import library, unavailable
from tdmpc_prune.agent.planner import planning_macs
from tdmpc_prune.deploy.export import draw_inputs, graph_session, ports_of
from tdmpc_prune.errors import UserError
from tdmpc_prune.machine import machine
from tdmpc_prune.words import table

RATES_HZ = (10, 50, 100, 400, 1_000)  # usual control rates
BLOCK = 10  # decisions of a warm block
_SQUARE = 512  # side of the matrices whose product gives the machine's rate

Decide = Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """One way to decide, and how long it took, in ms per decision."""

    what: str
    cold_cpu: list[float] = field(default_factory=list)
    cold_wall: list[float] = field(default_factory=list)
    warm_cpu: list[float] = field(default_factory=list)
    warm_wall: list[float] = field(default_factory=list)

    @property
    def reached_hz(self) -> int | None:
        """The fastest usual control rate that 95 % of its cold decisions keep, by CPU time."""
        slow = np.percentile(self.cold_cpu, 95)
        return max((rate for rate in RATES_HZ if slow <= 1000 / rate), default=None)


@dataclass(frozen=True)
class Candidates:
    """All of them, on this machine."""

    found: list[Candidate]  # the dense parent first
    floor_ms: float  # of the agent's matrix products alone, at the rate of large ones
    machine: str
    vector_width: int | None  # float32 numbers that the C planner works on at once

    def text(self) -> str:
        """The table, and what was compared with what."""
        dense = self.found[0]
        rows = []
        for one in self.found:
            times = (one.cold_cpu, one.warm_cpu)
            faster = [np.median(a) / np.median(b) for a, b in self._beside(dense, one)]
            rows.append(
                (
                    one.what,
                    *(f"{np.median(own):.3f}" for own in times),
                    f"{np.percentile(one.cold_cpu, 95):.3f}",
                    f"{max(one.cold_cpu):.3f}",
                    f"{np.median(one.cold_wall):.3f}",
                    f"{faster[0]:.1f}, {faster[1]:.1f}",
                    f"{one.reached_hz} Hz" if one.reached_hz else f"none of {RATES_HZ[0]} Hz on",
                )
            )
        names = ["CPU ms per decision", "cold", "warm", "95 %", "worst", "wall, cold"]
        names += ["times dense: cold, warm", "keeps"]
        width = f", {self.vector_width} numbers at once in C" if self.vector_width else ""
        return (
            f"{table(rows, names)}\n\n"
            f"one thread of a {self.machine}{width}; medians unless said otherwise; the agent's "
            f"matrix products alone would take {self.floor_ms:.3f} ms"
        )

    @staticmethod
    def _beside(dense: Candidate, one: Candidate) -> list[tuple[list[float], list[float]]]:
        return [(dense.cold_cpu, one.cold_cpu), (dense.warm_cpu, one.warm_cpu)]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"reached_hz": {one.what: one.reached_hz for one in self.found}}

    def line(self, agent: str) -> str:
        """A row of the page of measured machines."""
        cells = [self.machine, str(self.vector_width or "no compiler"), agent]
        by_name = {one.what: one for one in self.found}
        for what in ("dense parent", "PyTorch", "ONNX Runtime", "C"):
            one = by_name.get(what)
            cells.append(
                f"{np.median(one.cold_cpu):.3f}; {np.median(one.warm_cpu):.3f}" if one else "—"
            )
        return f"| {' | '.join([*cells, f'{self.floor_ms:.3f}'])} |"


PAGE = """# Measured machines

Milliseconds of CPU time per decision, one thread: cold (every candidate once per round); warm
(blocks of ten). Medians, all of one row measured in turn. The floor is the agent's matrix products
alone. Add your machine's row with

```sh
python scripts/benchmark.py checkpoints/cartpole-swingup-fitted episodes=0 page=.readme/machines.md
```

| processor | numbers at once in C | agent | dense parent | PyTorch | ONNX Runtime | C | floor |
|---|---|---|---|---|---|---|---|
"""


def add_to_page(page: Path, line: str) -> str:
    """The page's new text: with the line, at its end."""
    text = page.read_text() if page.exists() else PAGE
    return f"{text.rstrip()}\n{line}\n"


def measure_candidates(agent: Agent, dense: Agent, repeats: int) -> Candidates:
    """Time every way to decide that there is on this machine.

    Args:
        agent: on the CPU, as its parent.
        dense: the parent, with the planner to compare with.
        repeats: rounds, and warm blocks of each.
    """
    observation = np.zeros(agent.model.widths.observation, np.float32)

    def controlled(one: Agent, path: str) -> Decide:
        controller = Controller(one, decisions=path)
        return lambda: controller.act(observation)

    ways = {"dense parent": controlled(dense, "torch"), "PyTorch": controlled(agent, "torch")}
    if onnx := _onnx(agent):
        ways["ONNX Runtime"] = onnx
    width = None
    if unavailable() is None:
        ways["C"] = controlled(agent, "native")
        width = library().planner_width()
    found = {what: Candidate(what) for what in ways}
    for decide in ways.values():
        decide()
    square = torch.randn(_SQUARE, _SQUARE)
    products: list[float] = []
    for _ in range(repeats):
        for what, decide in ways.items():
            cpu, wall = _timed(decide, 1)
            found[what].cold_cpu.append(cpu)
            found[what].cold_wall.append(wall)
        products.append(_timed(lambda: square @ square, 1)[0])
    for _ in range(max(1, repeats // 3)):
        for what, decide in ways.items():
            cpu, wall = _timed(decide, 1 if what == "dense parent" else BLOCK)
            found[what].warm_cpu.append(cpu)
            found[what].warm_wall.append(wall)
    macs = planning_macs(agent.model, agent.config.planner)
    floor = macs / _SQUARE**3 * float(np.median(products))
    return Candidates(list(found.values()), floor, machine(), width)


def _timed(decide: Decide, count: int) -> tuple[float, float]:
    """CPU and wall time of a decision, ms."""
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(count):
        decide()
    spent = time.thread_time() - cpu, time.perf_counter() - wall
    return 1000 * spent[0] / count, 1000 * spent[1] / count


def _onnx(agent: Agent) -> Decide | None:
    """A decision by ONNX Runtime with noise drawn as its example does; None: not installed."""
    inputs, _ = ports_of(agent, "planner")
    with tempfile.TemporaryDirectory() as folder:
        try:
            session = graph_session(agent, "planner", Path(folder) / "planner.onnx")
        except UserError:
            return None
    generator = torch.Generator().manual_seed(0)
    fixed = [value.numpy() for value in draw_inputs(inputs, generator)]
    fed = {port.name: value for port, value in zip(inputs, fixed, strict=True)}
    return lambda: session.run(None, fed)
