"""Saved autoencoders: weights in safetensors, everything else in JSON, never pickled."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdmpc_prune.autoencoder.config import NetworkConfig
from tdmpc_prune.autoencoder.model import Autoencoder, Widths
from tdmpc_prune.errors import UserError
from tdmpc_prune.machine import versions
from tdmpc_prune.saving.files import load_tensors, read_json, save_tensors, write_json
from tdmpc_prune.saving.run_folder import checkpoint_dir, parent_folder, read_widths

FORMAT = "tdmpc_prune autoencoder"


@dataclass(frozen=True)
class SavedAutoencoder:
    """An autoencoder as a checkpoint holds it."""

    model: Autoencoder
    config: dict[str, Any]  # settings of the run that it comes from
    provenance: dict[str, Any]
    parent: Path | None = None  # folder of the dense one that it was cut from
    folder: Path | None = None  # from which it was loaded

    @property
    def is_dense(self) -> bool:
        """Whether nothing has been cut from it."""
        widths, network = self.model.widths, NetworkConfig(**self.config["network"])
        return widths == Widths.dense(network, widths.height, widths.width)


def is_autoencoder(path: str | Path) -> bool:
    """Whether a run or checkpoint is of an autoencoder. Raises UserError: there is none."""
    return (checkpoint_dir(path) / "autoencoder.json").is_file()


def write_autoencoder(folder: Path, saved: SavedAutoencoder) -> None:
    """Write its two files into `folder`, which may be renamed but not moved."""
    weights = {name: tensor.detach() for name, tensor in saved.model.state_dict().items()}
    checksum = save_tensors(folder, "autoencoder", weights)
    description = {
        "format": FORMAT,
        "widths": dataclasses.asdict(saved.model.widths),
        "config": saved.config,
        "parent": os.path.relpath(saved.parent, folder) if saved.parent else None,
        "provenance": saved.provenance | {"versions": versions()},
        "sha256": {"autoencoder.safetensors": checksum},
    }
    write_json(folder / "autoencoder.json", description)


def load_autoencoder(path: str | Path) -> SavedAutoencoder:
    """The autoencoder of a checkpoint, or of the newest checkpoint of a run.

    Raises:
        UserError: there is none, or it is damaged; and which.
    """
    folder = checkpoint_dir(path)
    if not (folder / "autoencoder.json").is_file():
        raise UserError(f"'{folder}' is not a checkpoint of an autoencoder")
    description = read_json(folder / "autoencoder.json")
    if description.get("format") != FORMAT:
        raise UserError(f"'{folder}' is not a checkpoint of an autoencoder of this package")
    weights = load_tensors(folder, "autoencoder", description.get("sha256", {}))
    try:
        model = Autoencoder(read_widths(Widths, description["widths"]))
        model.load_state_dict(weights)
        return SavedAutoencoder(
            model,
            description["config"],
            description["provenance"],
            parent_folder(folder, description.get("parent")),
            folder,
        )
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"checkpoint '{folder}' is damaged: {reason}") from error
