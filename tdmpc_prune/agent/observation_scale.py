"""Observations of any size: the encoder learns as if they were centred and scaled (ours).

Adam moves every weight by about the same, so that what an agent makes of an observation moves with
the observation's size: of a velocity of 10 a hundred times as fast as of an angle of 0.1. Learning
divides by that size. The weights are those of raw observations at all times: what is cut, saved,
exported or played needs to know nothing of a scale.

Shapes: O observation width, E units of the encoder's first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SMALLEST_STD = 0.01  # what varies less is not scaled: it may not have begun to vary yet


@dataclass(frozen=True)
class ObservationScale:
    """What observations are centred on and divided by."""

    mean: Tensor  # [O]
    std: Tensor  # [O]

    @staticmethod
    def of(observations: Tensor) -> ObservationScale:
        """The scale of `observations` `[N, O]`."""
        std = observations.std(0, correction=0)
        return ObservationScale(
            observations.mean(0), torch.where(std < _SMALLEST_STD, torch.ones_like(std), std)
        )

    @torch.no_grad()
    def fold(self, layer: nn.Linear) -> None:
        """Let a layer that was drawn for scaled observations take raw ones."""
        layer.weight /= self.std
        layer.bias -= layer.weight @ self.mean

    @contextmanager
    def scaled_gradient(self, layer: nn.Linear) -> Iterator[None]:
        """Inside, a layer's gradient `[E, O]` is that of a layer that takes scaled observations."""
        weight, bias = layer.weight.grad, layer.bias.grad
        weight.sub_(torch.outer(bias, self.mean)).div_(self.std)
        yield
        weight.mul_(self.std).add_(torch.outer(bias, self.mean))

    @torch.no_grad()
    def step(self, layer: nn.Linear, step: Callable[[], None]) -> None:
        """An optimiser's step, as if the layer took scaled observations."""
        before = layer.weight.detach().clone()
        with self.scaled_gradient(layer):
            step()
        moved = (layer.weight - before) / self.std
        layer.weight.copy_(before + moved)
        layer.bias.sub_(moved @ self.mean)
