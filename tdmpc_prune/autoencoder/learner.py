"""The autoencoder's update: mean squared error, Adam, and the hook for the importance tracker."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdmpc_prune.autoencoder.model import Autoencoder
from tdmpc_prune.errors import NonFiniteLoss
from tdmpc_prune.prunable import GradientHook

_LOSS = "reconstruction_loss"


class AutoencoderLearner:
    """The network that learns, and its optimiser.

    A hook in `gradient_hooks` is called as `hook(loss, parameters)` after each backward pass and
    before the optimiser's step, like those of the agent's learner.
    """

    def __init__(self, model: Autoencoder, learning_rate: float):
        self.model = model
        self.gradient_hooks: list[GradientHook] = []
        self.updates = 0
        self._named = list(model.named_parameters())
        optimiser = torch.optim.Adam([p for _, p in self._named], lr=learning_rate, fused=True)
        self.optimisers = {_LOSS: optimiser}

    def update(self, images: Tensor, learn: bool = True) -> float:
        """One update on images `[B, 1, H, W]`; returns the loss.

        `learn=False` changes nothing: only the hooks see the gradients.

        Raises:
            NonFiniteLoss: before any weight has changed by it.
        """
        self.optimisers[_LOSS].zero_grad()
        loss = F.mse_loss(self.model(images), images)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for _, p in self._named])
        value = loss.item()
        for term, found in (("reconstruction loss", value), ("gradient norm", norm.item())):
            if not math.isfinite(found):
                raise NonFiniteLoss(term, found)
        for hook in self.gradient_hooks:
            hook(_LOSS, self._named)
        if learn:
            self.optimisers[_LOSS].step()
            self.updates += 1
        return value

    def state(self) -> dict[str, Tensor]:
        """The optimiser's moments, by the names of their parameters."""
        moments = self.optimisers[_LOSS].state
        return {
            f"adam.{key}.{name}": value
            for name, parameter in self._named
            for key, value in moments[parameter].items()
        }

    def load_state(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go on from what `state` returned; the model's weights are loaded separately."""
        self.updates = updates
        moments = self.optimisers[_LOSS].state
        parameters = dict(self._named)
        for place, value in tensors.items():
            _, key, name = place.split(".", 2)
            moments[parameters[name]][key] = value
