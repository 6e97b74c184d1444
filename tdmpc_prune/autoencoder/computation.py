""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdmpc_prune.autoencoder.model import Autoencoder
from tdmpc_prune.prunable import Computation


def autoencoder_computation(model: Autoencoder) -> Computation:
    """All that is done with the network: its loss, and, counted, one reconstruction."""
    widths, dtype = model.widths, next(model.parameters()).dtype

    def images(count: int) -> Tensor:
        return torch.zeros(count, 1, widths.height, widths.width, device="meta", dtype=dtype)

    def update(networks: dict[str, nn.Module]) -> Tensor:
        return F.mse_loss(networks["model"](images(2)), images(2))

    def reconstruct(networks: dict[str, nn.Module]) -> Tensor:
        return networks["model"](images(1))

    return Computation({"model": model}, update, reconstruct)
