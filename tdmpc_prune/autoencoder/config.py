"""Everything about the autoencoder that can be set."""

from __future__ import annotations

from dataclasses import dataclass

from tdmpc_prune.settings import Choice, require, setting

KINDS = ("convolutional", "connected")

DATA = ("digits", "mnist")


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    name: str = setting("digits", "digits (they ship with scikit-learn), or mnist")
    dir: str | None = setting(None, "folder with MNIST's IDX files, gzipped or not")

    def __post_init__(self):
        require(self.name in DATA, f"data={self.name} must be one of {', '.join(DATA)}")


IMAGES = {
    "digits": Choice(DataConfig("digits"), "8 × 8, ship with scikit-learn"),
    "mnist": Choice(DataConfig("mnist"), "28 × 28, from data.dir"),
}


@dataclass(frozen=True)
class NetworkConfig:
    """Widths of the dense autoencoder; the decoder mirrors the encoder."""

    kind: str = setting("convolutional", "convolutional, or connected (fully)")
    widths: list[int] = setting(
        lambda: [32, 64], "channels, or hidden units, of the encoder's layers"
    )
    latent_width: int = setting(32, "dimension of the latent vector")

    def __post_init__(self):
        require(self.kind in KINDS, f"network.kind={self.kind} must be one of {', '.join(KINDS)}")
        require(
            len(self.widths) > 0 and min(self.widths) >= 1,
            f"network.widths={list(self.widths)} must be positive, and at least one",
        )
        require(
            self.latent_width >= 1, f"network.latent_width={self.latent_width} must be at least 1"
        )


@dataclass(frozen=True)
class LearningConfig:
    """The update."""

    batch: int = setting(64, "images per update")
    learning_rate: float = setting(1e-3, "of Adam")

    def __post_init__(self):
        require(self.batch >= 1, f"learning.batch={self.batch} must be at least 1")
        require(
            self.learning_rate > 0,
            f"learning.learning_rate={self.learning_rate} must be positive",
        )
