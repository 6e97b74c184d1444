"""A run's folder: what lies where in it, its newest checkpoint, its history.

::

    run.json                      the run's settings, versions and command
    history.jsonl                 episodes, evaluations, cuts …, one JSON object a line
    events.out.tfevents…          the same for TensorBoard, and more
    checkpoints/<n>-<time>/       the newest state
        agent.json                format, structure, settings, provenance, checksums
        agent.safetensors         the networks' weights (or autoencoder.json, .safetensors)
        training.json             counters, random states (absent from a shipped agent)
        training.safetensors      target network, Adam moments, episode in progress
        replay.safetensors        the replay buffer
        pruning.safetensors       the importance tracker, and what an undone cut goes back to
    agents/dense/                 the dense networks that the run's own were cut from
    agents/step-<n>/              the networks that each kept cut left, recovered
    plans/step-<n>.json, .md      each cut before it was made

A checkpoint has its final name only once it is whole, and the one before it is deleted only then.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from torch import Tensor

from tdmpc_prune.envs import task_name
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.machine import versions
from tdmpc_prune.saving.files import (
    load_tensors,
    read_json,
    save_tensors,
    write_file,
    write_folder,
    write_json,
)
from tdmpc_prune.settings import PROGRAM, quoted

W = TypeVar("W")

_DESCRIPTIONS = ("agent.json", "autoencoder.json")
_NAMED = 3  # folders that an error names at most


class RunFolder:
    """The folder of one run. As good as its path where a path is asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.history = self.path / "history.jsonl"
        self.dense = self.path / "agents" / "dense"

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def after_cut(self, step: int) -> Path:
        """Where the networks lie that cut `step` left, recovered."""
        return self.path / "agents" / f"step-{step}"

    def kept_networks(self) -> list[Path]:
        """The folders of the dense networks and of those after each kept cut, in order."""
        steps = (self.path / "agents").glob("step-[0-9]*")
        steps = sorted(steps, key=lambda step: int(step.name.removeprefix("step-")))
        return [self.dense, *steps] if self.dense.exists() else steps

    # --- Beginning, and who is at work in it -------------------------------------------------

    def create(self, settings: dict[str, Any], command: list[str]) -> None:
        """Make the folder of a new run, with its `run.json`.

        Raises:
            UserError: there is already a run in it.
            RunError: it could not be written.
        """
        resume = shlex.quote(f"resume={quoted(str(self))}")
        taken = UserError(
            f"'{self}' already holds a run: go on with {resume}, or give this one another folder "
            f"with run_dir=…"
        )
        if self.is_run:
            raise taken
        description = {"settings": settings, "versions": versions(), "command": command}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"'{self}' cannot be written: {error.strerror}") from error
        with self.owned():  # of two that start at once, one finds the other's
            if self.is_run:
                raise taken
            write_file(self.path / "run.json", json.dumps(description, indent=1) + "\n", "run_dir")

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go of it when the process ends.

        Raises:
            UserError: another process is at work in it.
            RunError: it cannot be written to.
        """
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise UserError(
                f"another process is at work in '{self}'; wait for its end, or stop it"
            ) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise RunError(f"'{self}' cannot be written: {error.strerror}") from error

    @property
    def is_run(self) -> bool:
        return (self.path / "run.json").is_file()

    def settings(self) -> dict[str, Any]:
        """The settings of the run. Raises UserError: there is no run in the folder."""
        settings = self._said("settings")
        if "task" in settings:
            settings["task"] = task_name(settings["task"])  # older runs kept it as it was typed
        return settings

    def command(self) -> str:
        """The command line that started the run."""
        return command_line(self._said("command"))

    def _said(self, what: str) -> Any:
        """What `run.json` says of the run."""
        if not self.is_run:
            above = run_folder(self)
            hint = f"; it lies in {shlex.quote(str(above))}" if above else _to_give(self.path, "; ")
            raise UserError(f"'{self}' is not the folder of a run (it has no run.json){hint}")
        description = read_json(self.path / "run.json")
        if what not in description:
            raise UserError(f"'{self}/run.json' is not of a run of this package")
        return description[what]

    # --- Checkpoints ------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Oldest first; there is more than one only while one is being replaced."""
        return sorted((self.path / "checkpoints").glob("[0-9]*-[0-9]*"))

    def check_newest(self, loaded: Path | None) -> None:
        """Refuse to go on from a checkpoint that is no longer the newest.

        Raises:
            UserError: another process went on with the run after `loaded` was read.
        """
        if loaded and self.checkpoints()[-1:] != [loaded]:
            raise UserError(f"another process went on with '{self}' meanwhile; try again")

    def save_checkpoint(
        self,
        now: int,
        write_networks: Callable[[Path], None],
        values: dict[str, Any],
        files: dict[str, dict[str, Any]],
    ) -> Path:
        """Save a run's state as its newest checkpoint, then delete the one before.

        Args:
            now: the run's time, for the checkpoint's name.
            write_networks: writes what is needed to use the networks into a folder.
            values: what else is needed to go on; JSON types.
            files: file name → name → tensor or array, likewise.

        Raises:
            RunError: it could not be written; earlier checkpoints are untouched.
        """
        earlier = self.checkpoints()
        number = int(earlier[-1].name.split("-")[0]) + 1 if earlier else 1
        target = self.path / "checkpoints" / f"{number:06d}-{now}"

        def write(part: Path) -> None:
            write_networks(part)
            sums = {f"{name}.safetensors": save_tensors(part, name, files[name]) for name in files}
            write_json(part / "training.json", values | {"sha256": sums})

        for left_behind in target.parent.glob(".*.part"):
            shutil.rmtree(left_behind, ignore_errors=True)
        write_folder(target, write)
        for old in earlier:
            shutil.rmtree(old, ignore_errors=True)
        return target

    # --- What it tells ----------------------------------------------------------------------

    def read_history(self, *kinds: str) -> list[dict[str, Any]]:
        """The lines of some kinds, or of all, in the history, in order."""
        text = self.history.read_text() if self.history.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that is being written, or never was finished
        entries = map(json.loads, whole.splitlines())
        return [entry for entry in entries if not kinds or entry["kind"] in kinds]

    def write_plan(self, step: int, plan: str, explanation: str) -> None:
        """Put the plan of cut `step` on file, as JSON and in words."""
        (self.path / "plans").mkdir(exist_ok=True)
        write_file(self.path / "plans" / f"step-{step}.json", plan, "run_dir")
        write_file(self.path / "plans" / f"step-{step}.md", f"{explanation}\n", "run_dir")

    def plans(self) -> list[Path]:
        """The plans on file, in order."""
        found = (self.path / "plans").glob("step-[0-9]*.json")
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def checkpoint_dir(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if any((path / name).is_file() for name in _DESCRIPTIONS):
        return path
    if found := RunFolder(path).checkpoints():
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
        (folder / "run.json").is_file() and bool(RunFolder(folder).checkpoints())
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


def load_training(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What `RunFolder.save_checkpoint` was given beside the networks.

    Raises:
        UserError: it is absent or damaged.
    """
    if not (folder / "training.json").is_file():
        raise UserError(f"'{folder}' holds networks but no training state to go on from")
    values = read_json(folder / "training.json")
    sums = values.pop("sha256", {})
    names = [file.removesuffix(".safetensors") for file in sums]
    return values, {name: load_tensors(folder, name, sums) for name in names}


def command_line(arguments: list[str]) -> str:
    """A command as it is typed in a checkout, or of the program, from its `sys.argv`."""
    name, rest = arguments[:1], arguments[1:]
    if name and name[0].startswith(f"{PROGRAM} "):
        return shlex.join([*name[0].split(), *rest])
    return shlex.join(["python", *(f"scripts/{Path(script).name}" for script in name), *rest])


def parent_folder(folder: Path, relative: str | None) -> Path | None:
    """The dense networks that others name relative to themselves; None if they are gone."""
    path = Path(os.path.normpath(folder / relative)) if relative else None
    return path if path and any((path / name).is_file() for name in _DESCRIPTIONS) else None


def read_widths(kind: type[W], values: dict[str, Any]) -> W:
    """Widths (a dataclass) from JSON, where tuples are lists."""

    def tuples(value: Any) -> Any:
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return kind(**{name: tuples(value) for name, value in values.items()})
