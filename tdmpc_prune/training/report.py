""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.controller import CPU_MS, decision_milliseconds, median_and_p95
from tdmpc_prune.words import table

Times = dict[str, dict[str, Any]]  # agent → its size, and "decision_ms" → "median", "p95"


def by_step(agents: Mapping[str, Agent]) -> dict[str, Agent]:
    """The agents of a pruning run in the order in which they came."""
    return dict(sorted(agents.items(), key=lambda item: (len(item[0]), item[0])))


def times(agents: Mapping[str, Agent]) -> Times:
    """Each agent's size, and median and 95 % of its time per decision, measured in turn."""
    measured = decision_milliseconds(*agents.values())
    found = {}
    for (name, agent), own in zip(agents.items(), measured, strict=True):
        median, p95 = median_and_p95(own)
        found[name] = agent.size()
        found[name]["decision_ms"] = {"median": round(median, 4), "p95": round(p95, 4)}
    return found


def times_table(found: Times) -> str:
    """What `times` measured, as Markdown."""
    rows = [
        (
            name,
            f"{own['sparsity']:.3f}",
            f"{own['parameters']:,}",
            f"{own['macs']:,}",
            f"{own['decision_ms']['median']:.2f}",
            f"{own['decision_ms']['p95']:.2f}",
        )
        for name, own in found.items()
    ]
    names = ["agent", "sparsity", "parameters", "planning MACs", f"{CPU_MS}, median", "95 %"]
    return table(rows, names)
