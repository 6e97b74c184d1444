"""Every way to decide with an agent, timed in turn: PyTorch, ONNX Runtime, C, and its dense parent.

Cold: each decides once per round, the others between. Warm: blocks of ten decisions, of the dense
parent one. CPU time of the deciding thread is what can be compared on a busy machine; wall time is
what a robot sees.
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
from matplotlib.figure import Figure

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.controller import Controller
from tdmpc_prune.agent.deciding import library, unavailable
from tdmpc_prune.agent.planner import planning_macs
from tdmpc_prune.deploy.export import draw_inputs, graph_session, ports_of
from tdmpc_prune.errors import UserError
from tdmpc_prune.machine import machine
from tdmpc_prune.saving.files import png
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
        kept = [rate for rate in RATES_HZ if self.share_within(1000 / rate) >= 0.95]
        return max(kept, default=None)

    def share_within(self, period_ms: float) -> float:
        """Of its cold decisions, those that take no longer, by CPU time."""
        return float(np.mean(np.array(self.cold_cpu) <= period_ms))

    def says(self, rate_hz: float) -> str:
        """Whether it keeps a control rate, and how nearly if it does not."""
        share = self.share_within(1000 / rate_hz)
        return "yes" if share >= 0.95 else f"{share:.0%} of them" if share else "no"


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
                )
            )
        names = ["CPU ms per decision", "cold", "warm", "95 %", "worst", "wall, cold"]
        names += ["times dense: cold, warm"]
        width = f", {self.vector_width} numbers at once in C" if self.vector_width else ""
        return (
            f"{table(rows, names)}\n\n"
            f"one thread of a {self.machine}{width}; medians unless said otherwise; the agent's "
            f"matrix products alone would take {self.floor_ms:.3f} ms\n\n{self.rates()}"
        )

    def rates(self) -> str:
        """Which of them keeps which usual control rate, as a table."""
        rows = [(one.what, *map(one.says, RATES_HZ)) for one in self.found]
        return table(rows, ["cold decisions in time, by CPU time", *(f"{r} Hz" for r in RATES_HZ)])

    def picture(self) -> bytes:
        """All of them on a scale of milliseconds, beside the usual control rates, as PNG."""
        figure = Figure(figsize=(9, 1.2 + 0.55 * len(self.found)), layout="constrained")
        axis = figure.subplots()
        bar = {"color": "C0", "linewidth": 6, "solid_capstyle": "butt"}
        for place, one in enumerate(self.found):
            label = None if place else "cold: median, 95 %, worst"
            median, most = np.median(one.cold_cpu), np.percentile(one.cold_cpu, 95)
            axis.plot([median, most], [place] * 2, "-", label=label, **bar)
            axis.plot(max(one.cold_cpu), place, "|", color="C0", markersize=12)
            label = None if place else "warm: median"
            axis.plot(np.median(one.warm_cpu), place, "o", color="C1", label=label)
        axis.axvline(self.floor_ms, color="0.4", linestyle=":", label="matrix products alone")
        for rate in RATES_HZ:
            axis.axvline(1000 / rate, color="C3", linestyle="--", linewidth=0.8)
            axis.annotate(
                f"{rate} Hz",
                (1000 / rate, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8,
                color="C3",
            )
        axis.set_yticks(range(len(self.found)), [one.what for one in self.found])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel(f"ms of CPU time per decision, one thread ({self.machine})")
        axis.grid(alpha=0.3, axis="x")
        figure.legend(loc="outside right upper", fontsize=7)
        return png(figure)

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
(blocks of ten; the dense parent once). Medians, all of one row measured in turn; ONNX Runtime
without the drawing of its noise. The floor is the agent's matrix products alone. Add your
machine's row with

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
    """A decision by ONNX Runtime, whose noise is not drawn anew; None: not installed."""
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
