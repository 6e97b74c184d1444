"""Saved agents: weights in safetensors, everything else in JSON, never pickled."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdmpc_prune.agent.agent import Agent, Interface
from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.controller import Controller
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.envs import task_name
from tdmpc_prune.errors import UserError
from tdmpc_prune.machine import versions
from tdmpc_prune.saving.files import load_tensors, read_json, save_folder, save_tensors, write_json
from tdmpc_prune.saving.run_folder import RunFolder, checkpoint_dir, parent_folder, read_widths
from tdmpc_prune.settings import from_plain, to_plain

FORMAT = "tdmpc_prune agent"

FORMAT_VERSION = 1

TARGET = "target"  # the target networks of an imported agent, beside its own


def save_agent(target: Path, agent: Agent, files: Mapping[str, bytes] | None = None) -> None:
    """Save what is needed to act, without what is needed to go on training.

    Args:
        target: its folder, which must not exist yet.
        agent: the agent.
        files: name → content of what goes with it.

    Raises:
        UserError: the folder exists.
        RunError: it could not be written; nothing is left behind.
    """

    def write(part: Path) -> None:
        write_agent(part, agent)
        for name, content in (files or {}).items():
            (part / name).write_bytes(content)

    save_folder(target, write)


def write_agent(folder: Path, agent: Agent) -> None:
    """Write the two files of an agent into `folder`, which may be renamed but not moved."""
    weights = {name: tensor.detach() for name, tensor in agent.model.state_dict().items()}
    checksum = save_tensors(folder, "agent", weights)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "task": agent.task,
        "action_repeat": agent.action_repeat,
        "widths": dataclasses.asdict(agent.model.widths),
        "interface": dataclasses.asdict(agent.interface) if agent.interface else None,
        "config": to_plain(agent.config),
        "parent": os.path.relpath(agent.parent, folder) if agent.parent else None,
        "provenance": agent.provenance
        | {
            "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        },
        "sha256": {"agent.safetensors": checksum},
    }
    write_json(folder / "agent.json", description)


def load_agent(
    path: str | Path, device: torch.device | str = "cpu", task: str | None = None
) -> Agent:
    """The agent of a checkpoint, or of the newest checkpoint of a run.

    Raises:
        UserError: there is none, or it is damaged, or no agent of this package's, or it is not
            for `task`; and which.
    """
    folder = checkpoint_dir(path)
    if (folder / "autoencoder.json").is_file():
        raise UserError(f"'{folder}' holds an autoencoder, and this needs an agent")
    description = read_json(folder / "agent.json")
    if description.get("format") != FORMAT:
        raise UserError(f"'{folder}' is not a checkpoint of this package (no '{FORMAT}' in it)")
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint '{folder}' has format version {description.get('format_version')}; "
            f"this release reads version {FORMAT_VERSION}"
        )
    theirs = task_name(str(description.get("task")))
    if task is not None and theirs != task_name(task):
        raise UserError(f"checkpoint '{folder}' is for task={theirs}, not {task_name(task)}")
    weights = load_tensors(folder, "agent", description.get("sha256", {}))
    try:
        with torch.device("meta"):  # weights need not be drawn first
            model = WorldModel(read_widths(Widths, description["widths"]))
        model.load_state_dict(weights, assign=True)
        return Agent(
            model=model.to(device),
            config=from_plain(AgentConfig, description["config"]),
            task=theirs,
            action_repeat=description["action_repeat"],
            provenance=description["provenance"],
            parent=parent_folder(folder, description.get("parent")),
            folder=folder,
            interface=_interface(description.get("interface")),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"checkpoint '{folder}' is damaged: {reason}") from error


def _interface(saved: dict[str, Any] | None) -> Interface | None:
    return read_widths(Interface, saved) if saved else None


def load(
    checkpoint: str | Path,
    *,
    dense: bool = False,
    actuator_units: bool = False,
    seed: int = 0,
    control_period: float | None = None,
    device: torch.device | str = "cpu",
) -> Controller:
    """A saved agent in control: `action = load("checkpoints/…")(observation)`.

    It has made a first decision, which is slower than those that follow, and was reset.

    Args:
        checkpoint: an agent's folder, or a run's, whose newest checkpoint it is.
        dense: the agent that it was cut from instead.
        actuator_units: give actions in the actuators' own units instead of [-1, 1].
        seed: of the planner's noise.
        control_period: seconds from one decision to the next, by which a decision is late; None
            takes the task's.
        device: to decide on.

    Raises:
        UserError: see `load_agent`; there is no dense agent; the units of its actuators are not
            on file.
    """
    agent = load_agent(checkpoint, device)
    if dense and (agent := dense_parent(checkpoint)) is None:
        raise UserError(f"'{checkpoint}' names no dense agent that is there")
    agent.model.to(device)
    Controller(agent).act([0.0] * agent.model.widths.observation)
    return Controller(agent, seed, actuator_units=actuator_units, control_period=control_period)


def load_target(agent: Agent) -> dict[str, Tensor]:
    """The target networks' weights that an imported agent brought along; none for others.

    Raises:
        UserError: they are damaged or gone.
    """
    sums = agent.provenance.get("imported", {}).get("target")
    if not sums or agent.folder is None or not (agent.folder / f"{TARGET}.safetensors").is_file():
        return {}
    return load_tensors(agent.folder, TARGET, sums)


def load_agents(path: str | Path) -> dict[str, Agent]:
    """The agents of a checkpoint, by name: all of a pruning run, or one with its dense parent.

    Raises:
        UserError: there is no agent.
    """
    found = {kept.name: load_agent(kept) for kept in RunFolder(path).kept_networks()}
    latest = load_agent(path)
    name = "latest" if found else Path(path).resolve().name
    if not found and latest.parent:
        found["dense"] = load_agent(latest.parent)
    return found | {name: latest}


def load_parent(
    agent: Agent, path: str | None = None, device: torch.device | str = "cpu"
) -> Agent | None:
    """The dense agent to compare an agent with: at `path`, or the one that it names.

    Raises:
        UserError: see `load_agent`; `path` holds an agent for another task.
    """
    folder = checkpoint_dir(path) if path else agent.parent
    return load_agent(folder, device, agent.task) if folder else None


def dense_parent(path: str | Path) -> Agent | None:
    """The agent that nothing had been cut from: a checkpoint's parent, or a dense one itself.

    None if the checkpoint is pruned and its parent is not there.
    """
    agent = load_agent(path)
    if agent.parent:
        return load_agent(agent.parent)
    return agent if agent.is_dense else None
