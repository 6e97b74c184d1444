"""Saved agents and saved runs: tensors in safetensors, everything else in JSON, never pickled.

A run's folder::

    run.json                      the run's settings, versions and command
    history.jsonl                 episodes and evaluations, one JSON object a line
    events.out.tfevents…          the same for TensorBoard, and more
    checkpoints/<n>-<env steps>/  the newest state
        agent.json                format, structure, settings, provenance, checksums
        agent.safetensors         the world model's weights
        training.json             counters, random states (absent from a shipped agent)
        training.safetensors      target network, Adam moments, episode in progress
        replay.safetensors        the replay buffer
    agents/dense/                 a pruned agent's dense parent: agent.json, agent.safetensors
    agents/step-<n>/              the agent that each kept cut left, recovered

A checkpoint is written under a hidden name, flushed to the disk, and then renamed, so that whatever
has its final name is whole; the one before it is deleted only after that.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as serialised
from torch import Tensor

from envs import task_name
from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.config import from_plain, to_plain
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.runtime import versions
from tdmpc_prune.settings import quoted

_DESCRIPTIONS = ("agent.json", "autoencoder.json")
_NAMED = 3  # folders that an error names at most
FORMAT = "tdmpc_prune agent"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SavedAgent:
    """An agent as a checkpoint holds it."""

    model: WorldModel
    config: AgentConfig
    task: str
    action_repeat: int
    provenance: dict[str, Any]  # seed, env steps, commands, evaluation … of the run it comes from
    parent: Path | None = None  # folder of the dense agent that it was cut from
    folder: Path | None = None  # from which it was loaded

    @property
    def is_dense(self) -> bool:
        """Whether nothing has been cut from it."""
        widths = self.model.widths
        return widths == Widths.dense(self.config.network, widths.observation, widths.action)


def checkpoint_dir(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if any((path / name).is_file() for name in _DESCRIPTIONS):
        return path
    found = sorted((path / "checkpoints").glob("[0-9]*-[0-9]*"))
    if found:
        return found[-1]
    if path.is_file():
        raise UserError(f"'{path}' is a file, and a checkpoint is a folder; {_to_give(path)}")
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist{_to_give(path, '; ')}")
    if (path / "run.json").is_file():
        raise UserError(f"the run '{path}' holds no checkpoint yet: it was not evaluated so far")
    raise UserError(f"'{path}' holds no checkpoint{_to_give(path, '; ')}")


def run_folder(path: str | Path) -> Path | None:
    """The folder of the run that `path` is, or lies in; None if there is none."""
    path = Path(path)
    near = (path, *path.parents)[:3]  # <run>/checkpoints/<n>-<env steps>, <run>/agents/<name>
    return next((folder for folder in near if (folder / "run.json").is_file()), None)


def beside(checkpoint: str | Path, name: str) -> Path:
    """Where what is found out about a checkpoint goes: into its run, or into its own folder.

    What is not in a run (a shipped agent), or cannot be written to, leaves its results in the
    current folder, under the checkpoint's name.
    """
    folder = checkpoint_dir(checkpoint)
    run = run_folder(folder)
    if run is not None:
        folder = run if folder.parent.name == "checkpoints" else folder
        if os.access(folder, os.W_OK):
            return folder / name
    return Path(f"{Path(checkpoint).resolve().name}-{name}")


def _to_give(path: Path, before: str = "") -> str:
    """What can be given in place of a path that is at a wrong level: the nearest, newest first."""
    start = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    if start is None or (start != path and start in (Path("."), Path("/"))):
        return ""
    found = [start] if _usable(start) and start != path else _inside(start)
    if not found and (run := run_folder(start)):
        found = [run]
    found = sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)
    if not found:
        return ""
    names = ", ".join(shlex.quote(str(folder)) for folder in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{before}there {'is' if len(found) == 1 else 'are'} {names}{more}"


def _usable(folder: Path) -> bool:
    """Whether it is a checkpoint, or a run that has one."""
    return any((folder / name).is_file() for name in _DESCRIPTIONS) or (
        (folder / "run.json").is_file() and any((folder / "checkpoints").glob("[0-9]*-[0-9]*"))
    )


def _inside(folder: Path, depth: int = 4) -> list[Path]:
    """The runs and checkpoints in a folder; what lies in a run counts as the run."""
    found = []
    with suppress(OSError):
        for inner in sorted(folder.iterdir()):
            if inner.name.startswith(".") or not inner.is_dir():
                continue
            if _usable(inner):
                found.append(inner)
            elif depth > 1:
                found += _inside(inner, depth - 1)
    return found


def save_checkpoint(
    run_dir: Path,
    now: int,
    write_networks: Callable[[Path], None],
    training: dict[str, Any],
    tensors: dict[str, dict[str, Any]],
) -> Path:
    """Save a run's state as its newest checkpoint, then delete the one before.

    Args:
        run_dir: the run's folder.
        now: the run's time, for the checkpoint's name.
        write_networks: writes what is needed to use the networks into a folder.
        training: what else is needed to go on; JSON types.
        tensors: file name → name → tensor or array, likewise.

    Raises:
        RunError: it could not be written; earlier checkpoints are untouched.
    """
    folder = run_dir / "checkpoints"
    earlier = sorted(folder.glob("[0-9]*-[0-9]*"))
    number = int(earlier[-1].name.split("-")[0]) + 1 if earlier else 1
    target = folder / f"{number:06d}-{now}"

    def write(part: Path) -> None:
        write_networks(part)
        sums = {f"{name}.safetensors": save_tensors(part, name, tensors[name]) for name in tensors}
        write_json(part / "training.json", training | {"sha256": sums})

    for left_behind in folder.glob(".*.part"):
        shutil.rmtree(left_behind, ignore_errors=True)
    write_folder(target, write)
    for old in earlier:
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_agent(target: Path, agent: SavedAgent, files: Mapping[str, bytes] | None = None) -> None:
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


def save_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Save networks in a new folder, which `write` fills: whole, or not at all.

    Raises:
        UserError: the folder exists.
        RunError: it could not be written; nothing is left behind.
    """
    if target.exists():
        raise UserError(f"'{target}' exists already; choose another folder")
    write_folder(target, write)


def write_agent(folder: Path, agent: SavedAgent) -> None:
    """Write the two files of an agent into `folder`, which may be renamed but not moved."""
    weights = {name: tensor.detach() for name, tensor in agent.model.state_dict().items()}
    checksum = save_tensors(folder, "agent", weights)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "task": agent.task,
        "action_repeat": agent.action_repeat,
        "widths": dataclasses.asdict(agent.model.widths),
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
) -> SavedAgent:
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
        model = WorldModel(_widths(description["widths"]))
        model.load_state_dict(weights)
        return SavedAgent(
            model=model.to(device),
            config=from_plain(AgentConfig, description["config"]),
            task=theirs,
            action_repeat=description["action_repeat"],
            provenance=description["provenance"],
            parent=_found(folder, description.get("parent")),
            folder=folder,
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"checkpoint '{folder}' is damaged: {reason}") from error


def load_agents(path: str | Path) -> dict[str, SavedAgent]:
    """The agents of a checkpoint, by name: all of a pruning run, or one with its dense parent.

    Raises:
        UserError: there is no agent.
    """
    kept = sorted(Path(path).glob("agents/[!.]*/agent.json"))
    found = {file.parent.name: load_agent(file.parent) for file in kept}
    latest = load_agent(path)
    name = "latest" if found else Path(path).resolve().name
    if not found and latest.parent:
        found["dense"] = load_agent(latest.parent)
    return found | {name: latest}


def _found(folder: Path, relative: str | None) -> Path | None:
    """The folder of an agent, named relative to another's; None if it is not there any more."""
    path = Path(os.path.normpath(folder / relative)) if relative else None
    return path if path and (path / "agent.json").is_file() else None


def load_parent(
    agent: SavedAgent, path: str | None = None, device: torch.device | str = "cpu"
) -> SavedAgent | None:
    """The dense agent to compare an agent with: at `path`, or the one that it names.

    Raises:
        UserError: see `load_agent`; `path` holds an agent for another task.
    """
    folder = checkpoint_dir(path) if path else agent.parent
    return load_agent(folder, device, agent.task) if folder else None


def dense_parent(path: str | Path) -> SavedAgent | None:
    """The agent that nothing had been cut from: a checkpoint's parent, or a dense one itself.

    None if the checkpoint is pruned and its parent is not there.
    """
    agent = load_agent(path)
    if agent.parent:
        return load_agent(agent.parent)
    return agent if agent.is_dense else None


def load_training(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What `save_checkpoint` was given beside the agent.

    Raises:
        UserError: it is absent or damaged.
    """
    if not (folder / "training.json").is_file():
        raise UserError(f"'{folder}' holds an agent but no training state to go on from")
    training = read_json(folder / "training.json")
    sums = training.pop("sha256", {})
    names = [file.removesuffix(".safetensors") for file in sums]
    return training, {name: load_tensors(folder, name, sums) for name in names}


def load_tensors(folder: Path, name: str, sums: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked against its checksum.

    Raises:
        UserError: the file is missing, or is not what was written.
    """
    path = folder / f"{name}.safetensors"
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != sums.get(path.name):
            raise UserError(f"'{path}' is damaged: it is not what was saved (checksum)")
        return {key: torch.from_numpy(array) for key, array in load_arrays(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error


def create_run(run_dir: Path, settings: dict[str, Any], command: list[str]) -> None:
    """Make the folder of a new run, with its `run.json`.

    Raises:
        UserError: there is already a run in it.
        RunError: it could not be written.
    """
    resume = shlex.quote(f"resume={quoted(str(run_dir))}")
    taken = UserError(
        f"'{run_dir}' already holds a run: go on with {resume}, or give this one another folder "
        f"with run_dir=…"
    )
    if (run_dir / "run.json").exists():
        raise taken
    description = {"settings": settings, "versions": versions(), "command": command}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"'{run_dir}' cannot be written: {error.strerror}") from error
    with owned(run_dir):  # of two that start at once, one finds the other's
        if (run_dir / "run.json").exists():
            raise taken
        part = run_dir / ".run.json.part"
        write_json(part, description)
        os.replace(part, run_dir / "run.json")


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the system lets go of it when the process ends.

    Raises:
        UserError: another process is at work in it.
        RunError: it cannot be written to.
    """
    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise UserError(
            f"another process is at work in '{run_dir}'; wait for its end, or stop it"
        ) from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise RunError(f"'{run_dir}' cannot be written: {error.strerror}") from error


def check_newest(run_dir: Path, loaded: Path | None) -> None:
    """Refuse to go on from a checkpoint that is no longer the run's newest.

    Raises:
        UserError: another process went on with the run after `loaded` was read.
    """
    if loaded and checkpoint_dir(run_dir) != loaded:
        raise UserError(f"another process went on with '{run_dir}' meanwhile; try again")


def read_run(run_dir: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        UserError: there is no run in that folder.
    """
    if not (run_dir / "run.json").is_file():
        above = run_folder(run_dir)
        hint = f"; it lies in {shlex.quote(str(above))}" if above else _to_give(run_dir, "; ")
        raise UserError(f"'{run_dir}' is not the folder of a run (it has no run.json){hint}")
    try:
        settings = read_json(run_dir / "run.json")["settings"]
    except KeyError as error:
        raise UserError(f"'{run_dir}/run.json' is not of a run of this package") from error
    if "task" in settings:
        settings["task"] = task_name(settings["task"])  # older runs kept it as it was typed
    return settings


def read_command(run_dir: Path) -> str:
    """The command line that started a run."""
    return command_line(read_json(run_dir / "run.json")["command"])


def command_line(arguments: list[str]) -> str:
    """A command as it is typed in a checkout, from its `sys.argv`."""
    script = [f"scripts/{Path(argument).name}" for argument in arguments[:1]]
    return shlex.join(["python", *script, *arguments[1:]])


def _widths(values: dict[str, Any]) -> Widths:
    """Widths from JSON, where tuples are lists."""

    def tuples(value):
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return Widths(**{name: tuples(value) for name, value in values.items()})


def save_tensors(folder: Path, name: str, tensors: dict[str, Any]) -> str:
    """Write tensors or arrays to a file and return its checksum."""
    arrays = {
        key: np.ascontiguousarray(value.cpu().numpy() if isinstance(value, Tensor) else value)
        for key, value in tensors.items()
    }
    # `save_file` would make a file that nobody else can read, whatever the umask.
    content = serialised(arrays)
    (folder / f"{name}.safetensors").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is damaged or no checkpoint of this package: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"'{path}' is no checkpoint of this package")
    return value


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make folder `target` with what `write` puts into it: whole, or not at all."""
    part = target.parent / f".{target.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)  # left behind by a crash
        part.mkdir(parents=True)
        write(part)
        for path in (*part.iterdir(), part):
            _flush(path)
        os.replace(part, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(
            f"'{target}' could not be saved: {error}; what was saved before is whole"
        ) from error


def _flush(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
