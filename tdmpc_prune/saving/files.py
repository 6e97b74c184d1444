"""Files that a command was told to write: whole, or not at all; and pictures as files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as serialised
from torch import Tensor

from tdmpc_prune.errors import RunError, UserError

if TYPE_CHECKING:  # drawing is slow to import, and most who save draw nothing
    from matplotlib.figure import Figure


def write_file(path: str | Path, content: str | bytes, setting: str) -> None:
    """Write `content` to `path`.

    Args:
        path: as the user gave it.
        content: text is encoded as UTF-8.
        setting: that named the path, for the error.

    Raises:
        RunError: it cannot be written; what was there before still is.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunError(f"{setting}={path} cannot be written: {error.strerror}") from error


def check_folder(path: str | Path, setting: str) -> None:
    """Refuse, before anything is measured, a file whose folder is not there.

    Raises:
        UserError: `path` lies in no folder that can be written to.
    """
    folder = Path(path).absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"{setting}={path} cannot be written: '{folder}' is no folder to write to")


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def save_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Save networks in a new folder, which `write` fills: whole, or not at all.

    Raises:
        UserError: the folder exists.
        RunError: it could not be written; nothing is left behind.
    """
    if target.exists():
        raise UserError(f"'{target}' exists already; choose another folder")
    write_folder(target, write)


def copy_networks(source: Path, target: Path) -> None:
    """Copy networks, without what is needed to go on training, into a new folder: whole or not."""

    def write(part: Path) -> None:
        for name in ("agent", "autoencoder"):
            for file in source.glob(f"{name}.*"):
                shutil.copyfile(file, part / file.name)

    write_folder(target, write)


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
