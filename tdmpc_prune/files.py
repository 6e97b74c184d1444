"""Files that a command was told to write: whole, or not at all; and pictures as files."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure

from tdmpc_prune.errors import RunError, UserError


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
