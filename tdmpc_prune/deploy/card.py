"""What is said of a saved agent: a table beside its dense parent, and the card shipped with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from tdmpc_prune.agent.agent import CARD, Agent, Interface
from tdmpc_prune.agent.controller import CPU_MS, decision_milliseconds, median_and_p95
from tdmpc_prune.agent.deciding import WHO, choose
from tdmpc_prune.envs import make_env, simulator_step_seconds
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import Evaluation, interface_of
from tdmpc_prune.machine import machine
from tdmpc_prune.saving.agents import save_agent
from tdmpc_prune.words import COLUMNS, counted, mean_and_std
from tdmpc_prune.words import table as markdown


@dataclass(frozen=True)
class Column:
    """One agent in the table."""

    agent: Agent
    returns: list[float] | None  # None if nothing is known of it
    source: str  # of the returns: "measured" or "recorded"
    decision_ms: float  # median
    p95_ms: float
    decisions: str  # "native" or "torch"


def columns(
    agent: Agent,
    evaluation: Evaluation,
    parent: Agent | None,
    parent_evaluation: Evaluation | None,
    decisions: str = "auto",
) -> list[Column]:
    """The agent and, if there is one, its parent; both are timed here, side by side.

    A parent that was not evaluated now is quoted with the returns that are on file for it.
    `decisions` as of `deciding.choose`.
    """
    agents = [agent, parent] if parent else [agent]
    path = choose(decisions, agent.model.widths, agent.device).path
    times = decision_milliseconds(*agents, decisions=path)
    found = [Column(agent, evaluation.returns, "measured", *median_and_p95(times[0]), path)]
    if parent:
        measured = parent_evaluation is not None
        returns = parent_evaluation.returns if measured else recorded_returns(parent)
        source = "measured" if measured else "recorded"
        found.append(Column(parent, returns, source, *median_and_p95(times[1]), path))
    return found


def recorded_returns(agent: Agent) -> list[float] | None:
    """The returns that are on file for an agent: of its card, or of its training."""
    card = agent.provenance.get("evaluation")
    return card["returns"] if card else agent.provenance.get("returns")


def table(found: list[Column]) -> str:
    """The columns beside each other, as Markdown."""
    task = found[0].agent
    env = make_env(task.task)
    seconds = simulator_step_seconds(env)
    env.close()
    sizes = [column.agent.size() for column in found]
    rows = {
        "return (mean ± std)": [_return(column) for column in found],
        "sparsity": [f"{size['sparsity']:.3f}" for size in sizes],
        "parameters": [f"{size['parameters']:,}" for size in sizes],
        "planner: samples × iterations × horizon": [_budget(column.agent) for column in found],
        "planning MACs per decision": [f"{size['macs']:,}" for size in sizes],
        f"{CPU_MS} (median; 95 % within)": [
            f"{column.decision_ms:.2f}; {column.p95_ms:.2f}" for column in found
        ],
        "decisions per second": [f"{1000 / column.decision_ms:.1f}" for column in found],
    }
    if seconds:
        needed = [1 / (seconds * column.agent.action_repeat) for column in found]
        rows["the task's control rate, Hz"] = [f"{rate:g}" for rate in needed]
    names = ["", "this agent", "dense parent"][: 1 + len(found)]
    return markdown([[name, *values] for name, values in rows.items()], names)


def text(found: list[Column], evaluation: Evaluation, seed: int) -> str:
    """All that `evaluate.py` prints."""
    agent = found[0].agent
    lines = [
        f"{agent.task}, {counted(len(evaluation), 'episode')} from seed {seed}, after "
        f"{agent.provenance['env_steps']} env steps of training",
        "",
        table(found),
        "",
        fill(f"per episode: {', '.join(f'{value:.1f}' for value in evaluation.returns)}", COLUMNS),
    ]
    if evaluation.mean_change is not None:
        lines.append(
            f"from one decision to the next an action changes by {evaluation.mean_change:.2f} on "
            f"average and {evaluation.largest_change:.2f} at most, where it goes from -1 to 1"
        )
    if len(found) > 1 and found[1].source == "recorded" and found[1].returns:
        count = len(found[1].returns)
        lines.append(
            f"the parent's return is on file, of {counted(count, 'episode')}; play_parent=true "
            f"plays it"
        )
    return "\n".join(lines)


def check_free(folder: Path) -> None:
    """Refuse, before anything is played, a folder that exists or that cannot be made.

    Raises:
        UserError: which of them.
    """
    if folder.exists():
        raise UserError(f"'{folder}' exists already; choose another folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"'{folder}' cannot be written: '{above}' is no folder to write to")


def ship(
    folder: Path,
    found: list[Column],
    seed: int,
    threads: int,
    command: str,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Save the agent without its training state, with a card of this evaluation.

    Args:
        folder: where to; it must not exist.
        found: what was measured; the parent's folder is noted, so that it is found again.
        seed: of the evaluation.
        threads: with which the times were measured.
        command: that shipped it.
        files: name → content of what else belongs to it.

    Raises:
        UserError, RunError: see `save_agent`.
    """
    column = found[0]
    agent = column.agent
    measured = {
        "episodes": len(column.returns),
        "seed": seed,
        "returns": column.returns,
        "decision_ms": column.decision_ms,
        "decision_p95_ms": column.p95_ms,
        "machine": machine(),
        "threads": threads,
        "decisions": column.decisions,
    }
    commands = [*agent.provenance.get("commands", []), command]
    provenance = agent.provenance | {"evaluation": measured, "commands": commands}
    provenance.pop("returns", None)  # of its training; this evaluation stands for it
    parent = found[1].agent.folder if len(found) > 1 else None
    interface = agent.interface or _interface(agent)
    shipped = replace(agent, provenance=provenance, parent=parent, interface=interface)
    card = _card(folder.name, [replace(column, agent=shipped), *found[1:]], measured)
    save_agent(folder, shipped, {CARD: card.encode()} | dict(files or {}))


def _interface(agent: Agent) -> Interface:
    """Of an agent that was saved before it was noted."""
    env = make_env(agent.task, agent.action_repeat)
    try:
        return interface_of(env, agent.action_repeat)
    finally:
        env.close()


def _card(name: str, found: list[Column], measured: dict[str, Any]) -> str:
    column = found[0]
    agent, returns = column.agent, column.returns
    pruning = agent.provenance.get("pruning")
    how = "dense" if agent.is_dense else f"pruned by `{pruning['method']}`" if pruning else "pruned"
    lines = [
        f"# {name}",
        "",
        f"An agent for `{agent.task}` ({how}): seed {agent.provenance['seed']}, "
        f"{agent.provenance['env_steps']} env steps, {agent.provenance['decisions']} decisions, "
        f"{agent.provenance['updates']} updates. One decision lasts {agent.action_repeat} "
        f"simulator steps.",
        "",
        table(found),
        "",
        f"Returns are of {counted(len(returns), 'episode')} from seed {measured['seed']}: "
        + ", ".join(f"{value:.0f}" for value in returns)
        + ". Milliseconds per decision: CPU time of the deciding thread, one environment, "
        f"{counted(measured['threads'], 'thread')} of a {measured['machine']}, "
        f"{WHO[column.decisions]} deciding.",
    ]
    if pruning and pruning.get("shortfall") and (pruning["cuts"] or pruning["undone"]):
        lines += [
            "",
            f"A sparsity of {pruning['asked_sparsity']:g} was asked for, and "
            f"{pruning['sparsity']:.3f} reached: {pruning['shortfall']}.",
        ]
    if len(found) > 1 and found[1].source == "recorded":
        lines += ["", "The parent's return is the one on file for it."]
    lines += ["", "Made by", "", "```sh", *agent.provenance["commands"], "```", ""]
    return "\n".join(lines)


def _budget(agent: Agent) -> str:
    planner = agent.config.planner
    return f"{planner.samples} × {planner.iterations} × {planner.horizon}"


def _return(column: Column) -> str:
    if not column.returns:
        return "not on file"
    shown = mean_and_std(column.returns)
    return shown if column.source == "measured" else f"{shown} ({column.source})"
