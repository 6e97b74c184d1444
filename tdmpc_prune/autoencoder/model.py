"""The autoencoders: an encoder to a latent vector, and a decoder back to the image.

Shapes: B images, H and W their sides, D the latent width. Everything is float32. Widths may differ
from layer to layer, so that a pruned model is the same class with smaller widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdmpc_prune.autoencoder.config import NetworkConfig
from tdmpc_prune.prunable import tag

_STRIDE = 2  # of every convolution, which halves the sides


@dataclass(frozen=True)
class Widths:
    """The structure of an autoencoder: all that is needed to build it empty."""

    convolutional: bool
    height: int
    width: int
    encoder: tuple[int, ...]  # channels or hidden units, first layer first
    latent: int
    decoder: tuple[int, ...]  # likewise, in the decoder's order

    @staticmethod
    def dense(network: NetworkConfig, height: int, width: int) -> Widths:
        """The widths of an autoencoder that nothing has been cut from, for such images."""
        return Widths(
            network.kind == "convolutional",
            height,
            width,
            tuple(network.widths),
            network.latent_width,
            tuple(reversed(network.widths)),
        )

    @staticmethod
    def of_weights(like: Widths, weights: Mapping[str, Tensor]) -> Widths:
        """The widths of the autoencoder that these weights (a state dict) belong to.

        Args:
            like: of the same kind and picture.
            weights: of the model.
        """
        encoder = [w for name, w in weights.items() if name.startswith("encoder") and w.dim() > 1]
        decoder = [w for name, w in weights.items() if name.startswith("decoder") and w.dim() > 1]
        *written, latent = (len(w) for w in encoder)
        # A transposed convolution has its input channels first.
        read = [w.shape[0] if w.dim() == 4 else w.shape[1] for w in decoder[1:]]
        return Widths(
            like.convolutional, like.height, like.width, tuple(written), latent, tuple(read)
        )


class Autoencoder(nn.Module):
    """Image `[B, 1, H, W]` in [0, 1] → its reconstruction, of the same shape."""

    def __init__(self, widths: Widths):
        super().__init__()
        self._built_with = widths
        build = _convolutional if widths.convolutional else _fully_connected
        self.encoder, self.decoder = (
            tag(part, name)
            for part, name in zip(build(widths), ("encoder", "decoder"), strict=True)
        )

    @property
    def widths(self) -> Widths:
        """The present structure, read off the weights, so that it is true after any surgery."""
        return Widths.of_weights(self._built_with, self.state_dict())

    def encode(self, images: Tensor) -> Tensor:
        """`[B, 1, H, W]` → latent `[B, D]`."""
        return self.encoder(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encode(images)).view(images.shape)


def _convolutional(widths: Widths) -> tuple[nn.Sequential, nn.Sequential]:
    """Strided convolutions to a latent vector, and transposed ones back."""
    sides = [(widths.height, widths.width)]
    for _ in widths.encoder:
        sides.append(tuple(-(-side // _STRIDE) for side in sides[-1]))
    encoder: list[nn.Module] = []
    channels = 1
    for count in widths.encoder:
        encoder += [nn.Conv2d(channels, count, 3, _STRIDE, padding=1), nn.ELU()]
        channels = count
    low = sides[-1][0] * sides[-1][1]
    encoder += [nn.Flatten(), nn.Linear(channels * low, widths.latent)]

    first, *rest = widths.decoder
    decoder: list[nn.Module] = [nn.Linear(widths.latent, first * low), nn.ELU()]
    decoder += [nn.Unflatten(1, (-1, *sides[-1]))]
    for depth, (reads, writes) in enumerate(zip(widths.decoder, [*rest, 1], strict=True)):
        here, next_ = sides[-1 - depth], sides[-2 - depth]
        grown = tuple(
            big - ((small - 1) * _STRIDE + 1) for big, small in zip(next_, here, strict=True)
        )
        decoder += [nn.ConvTranspose2d(reads, writes, 3, _STRIDE, padding=1, output_padding=grown)]
        decoder += [nn.ELU() if writes != 1 or depth < len(rest) else nn.Sigmoid()]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def _fully_connected(widths: Widths) -> tuple[nn.Sequential, nn.Sequential]:
    pixels = widths.height * widths.width

    def layers(inputs: int, hidden: tuple[int, ...], outputs: int) -> list[nn.Module]:
        found: list[nn.Module] = []
        for width in hidden:
            found += [nn.Linear(inputs, width), nn.ELU()]
            inputs = width
        return [*found, nn.Linear(inputs, outputs)]

    encoder = [nn.Flatten(), *layers(pixels, widths.encoder, widths.latent)]
    return nn.Sequential(*encoder), nn.Sequential(
        *layers(widths.latent, widths.decoder, pixels), nn.Sigmoid()
    )


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB `[B]`; the peak is 1."""
    error = (images - reconstructions).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-12))
