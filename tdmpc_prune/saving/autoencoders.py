""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tdmpc_prune.autoencoder.model import Autoencoder, Widths
from tdmpc_prune.errors import UserError
from tdmpc_prune.saving.files import load_tensors, read_json
from tdmpc_prune.saving.run_folder import (
    checkpoint_dir,
)
from tdmpc_prune.settings import from_plain
from tdmpc_prune.training.config import AutoencoderConfig

FORMAT = "tdmpc_prune autoencoder"


def saved_config(path: str | Path) -> AutoencoderConfig:
    """The settings of the run that a checkpoint comes from. Raises UserError: see below."""
    return from_plain(AutoencoderConfig, _description(checkpoint_dir(path))["config"])


def updates_of(path: str | Path) -> int:
    """Updates that made an autoencoder. Raises UserError: see `saved_config`."""
    return _description(checkpoint_dir(path))["provenance"]["updates"]


def is_autoencoder(path: str | Path) -> bool:
    """Whether a run or checkpoint is of an autoencoder. Raises UserError: there is none."""
    return (checkpoint_dir(path) / "autoencoder.json").is_file()


def load_autoencoder(path: str | Path) -> Autoencoder:
    """The autoencoder of a checkpoint, or of the newest checkpoint of a run.

    Raises:
        UserError: there is none, or it is damaged; and which.
    """
    folder = checkpoint_dir(path)
    description = _description(folder)
    weights = load_tensors(folder, "autoencoder", description.get("sha256", {}))
    try:
        widths = description["widths"]
        widths |= {name: tuple(widths[name]) for name in ("encoder", "decoder")}
        model = Autoencoder(Widths(**widths))
        model.load_state_dict(weights)
        return model
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"checkpoint '{folder}' is damaged: {reason}") from error


def _description(folder: Path) -> dict[str, Any]:
    if not (folder / "autoencoder.json").is_file():
        raise UserError(f"'{folder}' is not a checkpoint of an autoencoder")
    description = read_json(folder / "autoencoder.json")
    if description.get("format") != FORMAT:
        raise UserError(f"'{folder}' is not a checkpoint of an autoencoder of this package")
    return description
