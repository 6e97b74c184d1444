"""Real images: MNIST from its IDX files, or the handwritten digits that ship with scikit-learn.

Nothing is downloaded. Images are float32 `[N, 1, H, W]` in [0, 1].
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdmpc_prune.errors import UserError

_MNIST = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_UNSIGNED_BYTES = 0x08  # IDX's code of the type
_TEST_SHARE = 0.2  # of scikit-learn's digits, which come as one set


@dataclass(frozen=True)
class Images:
    """A set to train on and one to measure with."""

    train: Tensor
    test: Tensor


def load_images(name: str, folder: str | None) -> Images:
    """The images called `name`: digits, or mnist from the IDX files in `folder`.

    Raises:
        UserError: a file is missing or damaged, or no folder is given.
    """
    if name == "digits":
        return _digits()
    if folder is None:
        raise UserError("data=mnist needs data.dir=<folder with MNIST's IDX files>")
    sets = {}
    for part, file in _MNIST.items():
        paths = [Path(folder) / file, Path(folder) / f"{file}.gz"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UserError(f"data.dir={folder} holds neither {file} nor {file}.gz")
        sets[part] = torch.from_numpy(read_idx(path)).unsqueeze(1) / 255
    return Images(**sets)


def read_idx(path: Path) -> np.ndarray:
    """The images `[N, H, W]`, uint8, of an IDX file, gzipped or not.

    Raises:
        UserError: it is no IDX file of images, or damaged.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    if len(content) < 16 or content[:4] != bytes([0, 0, _UNSIGNED_BYTES, 3]):
        raise UserError(f"'{path}' is no IDX file of images (its first bytes say something else)")
    shape = struct.unpack(">3I", content[4:16])
    if len(content) - 16 != math.prod(shape):
        raise UserError(
            f"'{path}' is damaged: it should hold {math.prod(shape)} pixels of {shape[0]} images, "
            f"and holds {len(content) - 16}"
        )
    return np.frombuffer(content, np.uint8, offset=16).reshape(shape).copy()


def _digits() -> Images:
    from sklearn.datasets import load_digits  # slow to import, and agents learn no images

    pixels = torch.from_numpy(load_digits().images.astype(np.float32) / 16).unsqueeze(1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    tested = round(_TEST_SHARE * len(pixels))
    return Images(train=pixels[order[tested:]], test=pixels[order[:tested]])
