"""Training an autoencoder on images. A `Trainee`.

Time is counted in updates; the score is the PSNR on images that are not learnt from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc_prune.autoencoder.computation import autoencoder_computation
from tdmpc_prune.autoencoder.data import Images, load_images
from tdmpc_prune.autoencoder.learner import AutoencoderLearner
from tdmpc_prune.autoencoder.model import Autoencoder, Widths, psnr
from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Calibration, Computation, component_parameters
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.refit import calibration_of
from tdmpc_prune.saving.autoencoders import SavedAutoencoder, load_autoencoder, write_autoencoder
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.settings import to_plain
from tdmpc_prune.training import report
from tdmpc_prune.training.config import AutoencoderConfig
from tdmpc_prune.training.log import Averages, RunLog
from tdmpc_prune.words import counted

_CALIBRATION_IMAGES = 1_000
_CALIBRATION_BATCH = 50
_SHOWN = 10  # images in the pictures


@dataclass(frozen=True)
class Fidelity:
    """How well images are reconstructed."""

    psnr: list[float]  # of each image, dB
    known = False  # it is always of all images

    def __len__(self) -> int:
        return len(self.psnr)

    @property
    def mean(self) -> float:
        return float(np.mean(self.psnr))

    @property
    def std(self) -> float:
        return float(np.std(self.psnr))

    def first(self, count: int) -> Fidelity:
        return replace(self, psnr=self.psnr[:count])


class AutoencoderTraining:
    """An autoencoder that learns images."""

    unit, score, remark = "updates", "PSNR", None
    script, learning_rate = "train_autoencoder.py", "learning.learning_rate"

    def __init__(self, config: AutoencoderConfig):
        """A new network. Raises UserError: the images are missing or damaged."""
        self.config = config
        self.images = load_images(config.data.name, config.data.dir)
        height, width = self.images.train.shape[2:]
        self.dense = Widths.dense(config.network, height, width)
        torch.manual_seed(config.seed)
        self.learner = AutoencoderLearner(Autoencoder(self.dense), config.learning.learning_rate)
        self.rng = np.random.default_rng(config.seed)
        self.averages = Averages()
        self.samples = (len(self.images.test), len(self.images.test))

    @property
    def model(self) -> Autoencoder:
        return self.learner.model

    @property
    def what(self) -> str:
        parameters = counted(self.size()["parameters"], "parameter")
        return f"autoencoder of {self.config.data.name}: {parameters} on cpu"

    @property
    def now(self) -> int:
        return self.learner.updates

    @property
    def end(self) -> int:
        return self.config.updates

    @property
    def first_update(self) -> int:
        return -1

    @property
    def unfinished(self) -> bool:
        return False

    @property
    def owes_updates(self) -> bool:
        return False

    def batch(self) -> Tensor:
        """Random images to learn from, `[B, 1, H, W]`."""
        count = len(self.images.train)
        return self.images.train[self.rng.integers(count, size=self.config.learning.batch)]

    def advance(self, log: RunLog) -> None:
        """An update."""
        loss = self.learner.update(self.batch())
        self.averages.add({"losses/reconstruction loss": loss})
        log.progress(self.now, loss=f"{loss:.3g}")

    def gather(self, log: RunLog) -> bool:
        self.learner.update(self.batch(), learn=False)
        return True

    # --- What it is now ---------------------------------------------------------------------

    def rehearse(self) -> None:
        """The images are there already."""

    @torch.no_grad()
    def measure(
        self, samples: int, least: int | None, interrupted: Callable[[], bool], log: RunLog
    ) -> Fidelity:
        images = self.images.test[:samples]
        return Fidelity(psnr(images, self.model(images)).tolist())

    def said(self, measured: Fidelity) -> str:
        return f"PSNR {measured.mean:.2f} dB over {counted(len(measured), 'image')}"

    def evaluated(self, measured: Fidelity, log: RunLog) -> dict[str, Any]:
        log.scalars(self.now, self.averages.take())
        return {"mean": measured.mean, "std": measured.std}

    def of_each(self, measured: Fidelity) -> dict[str, Any]:
        return {}

    def size(self) -> dict[str, float]:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "sparsity": 1 - parameters / sum(self.dense_parameters().values()),
            "parameters": parameters,
        }

    def dense_parameters(self) -> dict[str, int]:
        with torch.device("meta"):
            dense = Autoencoder(self.dense)
        return {
            name: sum(parameter.numel() for parameter in own)
            for name, own in component_parameters(dense).items()
        }

    def computation(self) -> Computation:
        return autoencoder_computation(self.model)

    def settle(self) -> None:
        pass

    def calibration(self) -> Calibration:
        return image_calibration(self.model, self.images, self.config.seed)

    def mend(self, whole: Mapping[str, Tensor], plan: Plan, done: int, most: int) -> int:
        raise UserError("prune.distil is for agents; an autoencoder's cut is only refitted")

    @torch.no_grad()
    def conclude(self, folder: RunFolder, log: RunLog) -> list[str]:
        """`reconstructions.png`: originals, the dense network's, and the present one's."""
        rows: dict[str, Tensor] = {"original": self.images.test[:_SHOWN]}
        if folder.dense.exists():
            rows["dense"] = load_autoencoder(folder.dense).model(rows["original"])
        rows["pruned" if self.model.widths != self.dense else "dense"] = self.model(
            rows["original"]
        )
        path = report.reconstructions(folder, rows)
        log.picture("reconstructions", path, self.now)
        return [
            f"{self.size()['parameters']:,} parameters",
            f"reconstructions   {path}",
        ]

    def close(self) -> None:
        """It holds nothing open."""

    # --- Saving and going on ---------------------------------------------------------------

    def write_networks(
        self,
        folder: Path,
        measured: Fidelity | None,
        provenance: dict[str, Any],
        parent: Path | None,
    ) -> None:
        own = {
            "seed": self.config.seed,
            "updates": self.now,
            "psnr": measured.mean if measured else None,
        }
        saved = SavedAutoencoder(self.model, to_plain(self.config), own | provenance, parent)
        write_autoencoder(folder, replace(saved, parent=None) if saved.is_dense else saved)

    def rebuild(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        model = Autoencoder(Widths.of_weights(self.dense, weights))
        model.load_state_dict(weights)
        self.take_learner(model, state, self.learner.updates)

    def take_learner(self, model: Autoencoder, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on with this model, and with its learner's saved state if there is one."""
        self.learner = AutoencoderLearner(model, self.config.learning.learning_rate)
        self.learner.load_state(state, updates)

    def state(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        values = {"progress": {}, "rng": self.rng.bit_generator.state}
        return values, {"training": self.learner.state()}

    def load(self, path: Path) -> SavedAutoencoder:
        return load_autoencoder(path)

    def load_state(
        self,
        saved: SavedAutoencoder,
        values: dict[str, Any],
        files: dict[str, dict[str, Tensor]],
    ) -> None:
        self.take_learner(saved.model, files["training"], values["updates"])
        self.rng.bit_generator.state = values["rng"]

    def take_over(
        self,
        saved: SavedAutoencoder,
        values: dict[str, Any] | None,
        files: dict[str, dict[str, Tensor]],
    ) -> None:
        """Raises UserError: its data or network are not this run's, and what differs."""
        ours = to_plain(self.config)
        for name in ("data", "network"):
            if saved.config[name] != ours[name]:
                raise UserError(
                    f"start_from={saved.folder}: its {name} is {saved.config[name]}, the run's is "
                    f"{ours[name]}"
                )
        if values is not None:
            self.take_learner(saved.model, files["training"], values["updates"])
        else:
            self.take_learner(saved.model, {}, saved.provenance["updates"])

    def measurement(self, values: dict[str, Any]) -> Fidelity:
        return Fidelity(**values)


def image_calibration(model: Autoencoder, images: Images, seed: int) -> Calibration:
    """How a cut autoencoder is fitted: on images to learn from; every pixel matters."""
    batches = images.train[:_CALIBRATION_IMAGES].split(_CALIBRATION_BATCH)

    def reconstruct(network: nn.Module, batch: Tensor) -> Tensor:
        return network(batch)

    def felt(network: nn.Module, batch: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, batch.shape, generator=generator) * 2 - 1
        return (signs * network(batch)).sum()

    return replace(calibration_of(model, batches, reconstruct), sensitivity=felt)
