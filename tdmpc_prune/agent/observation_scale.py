"""Observations of any size: the encoder learns as if none of them were small or huge (ours).

Adam moves every weight by about the same, so that what an agent makes of an observation moves with
the observation's size: of an angle of 0.1 a hundredth as fast as of a velocity of 10. Learning
centres and enlarges what varies little, and shrinks what varies by far too much. What lies between
is left alone: random decisions go further than good ones, which need to be precise. The weights are
those of raw observations at all times: whoever saves, exports or plays them needs to know nothing
of a scale. Offline steps (`distillation.py`) are of raw observations.

Shapes: O observation width, E units of the encoder's first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_USUAL = (1.0, 10.0)  # deviations of what is left alone
_SMALLEST = 0.01  # so is what varies less: it may not have begun to vary yet
_ENLARGED = 20  # times at most
_FAR = 100  # what lies so many deviations from zero is left alone: rounding would be all it learns


@dataclass(frozen=True)
class ObservationScale:
    """What observations are centred on and divided by."""

    centre: Tensor  # [O]
    size: Tensor  # [O]

    @staticmethod
    def of(observations: Tensor) -> ObservationScale:
        """The scale of `observations` `[N, O]`."""
        mean, std = observations.mean(0), observations.std(0, correction=0)
        size = (std / std.clamp(*_USUAL)).clamp(min=1 / _ENLARGED)
        size = torch.where((std < _SMALLEST) | (mean.abs() > _FAR * std), 1.0, size)
        return ObservationScale(torch.where(size == 1, 0.0, mean), size)

    @torch.no_grad()
    def fold(self, layer: nn.Linear) -> None:
        """Let a layer that was drawn for scaled observations take raw ones."""
        layer.weight /= self.size
        layer.bias -= layer.weight @ self.centre

    @contextmanager
    def scaled_gradient(self, layer: nn.Linear) -> Iterator[None]:
        """Inside, a layer's gradient `[E, O]` is that of a layer that takes scaled observations."""
        weight, bias = layer.weight.grad, layer.bias.grad
        weight.sub_(torch.outer(bias, self.centre)).div_(self.size)
        try:
            yield
        finally:
            weight.mul_(self.size).add_(torch.outer(bias, self.centre))

    @torch.no_grad()
    def step(self, layer: nn.Linear, step: Callable[[], None]) -> None:
        """An optimiser's step, as if the layer took scaled observations."""
        before = layer.weight.detach().clone()
        with self.scaled_gradient(layer):
            step()
        moved = (layer.weight - before) / self.size
        layer.weight.copy_(before + moved)
        layer.bias.sub_(moved @ self.centre)
