""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from envs import task_name
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.machine import versions
from tdmpc_prune.saving.files import load_tensors, read_json, save_tensors, write_folder, write_json
from tdmpc_prune.settings import quoted

_DESCRIPTIONS = ("agent.json", "autoencoder.json")

_NAMED = 3  # folders that an error names at most


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


def read_history(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    """The lines of some kinds in a run's history, in order."""
    path = run_dir / "history.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a line that is being written, or never was finished
    return [entry for entry in map(json.loads, whole.splitlines()) if entry["kind"] in kinds]
