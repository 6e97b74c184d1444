"""The update in C: both losses with their gradients, Adam and the targets' moving average (ours).

What `Learner` does with PyTorch on the other path, on the same tensors: gradients are put where
`.grad` is looked for, Adam's moments are those of `torch.optim.Adam`, and whoever cuts or replaces
tensors need not tell.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from tdmpc_prune.agent.config import LearningConfig
from tdmpc_prune.agent.replay import Batch
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.native.learner import Adam, Losses, MovingAverage

Trained = Mapping[str, list[tuple[str, Tensor]]]  # loss → the parameters that it trains, by name


class FusedUpdate:
    """The four parts of an update, on the weights as they are at each call."""

    def __init__(
        self,
        library: ctypes.CDLL,
        model: WorldModel,
        target: WorldModel,
        trained: Trained,
        optimisers: Mapping[str, torch.optim.Adam],
        config: LearningConfig,
    ):
        """Compute with what `learner.library` returned, for a `Learner` with these parts."""
        self._library, self._config = library, config
        self._model, self._target = model, target
        self._trained, self._optimisers = trained, optimisers
        self._gradients: dict[str, Tensor] = {}  # of each loss, all in one
        self._known: dict[str, tuple] = {}  # where tensors lay when they were described to C
        self._losses: Losses | None = None
        self._average: MovingAverage | None = None
        self._adam: dict[str, Adam] = {}

    def model_loss(self, batch: Batch, noise: Tensor) -> tuple[np.ndarray, float, np.ndarray]:
        """The gradients of all but the policy, of the loss over H, clipped, in `.grad`.

        Args:
            batch: of tensors.
            noise: `[H, B, A]`, as in `learner.model_loss`.

        Returns:
            Consistency, reward, value and total loss; the gradient's norm; priorities `[B]`.
        """
        self._describe(*batch.rewards.shape)
        terms, priorities = self._losses.model_loss(_arrays(vars(batch)), _array(noise))
        return terms, self._take_gradients("model_loss"), priorities

    def policy_loss(self, batch: Batch, noise: Tensor) -> tuple[float, float]:
        """The policy's gradients, clipped, in `.grad`; at the latents of the last `model_loss`.

        Args:
            batch: the same.
            noise: `[H + 1, B, A]`.

        Returns:
            The loss, and the gradient's norm.
        """
        loss = self._losses.policy_loss(_arrays(vars(batch)), _array(noise))
        return loss, self._take_gradients("policy_loss")

    def step(self, loss: str) -> None:
        """The step of a loss's optimiser."""
        optimiser = self._optimisers[loss]
        (group,) = optimiser.param_groups
        parts = []
        for _, parameter in self._trained[loss]:
            state = optimiser.state[parameter]
            if not state:  # as it begins
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros(2, *parameter.shape)
            moments = (state[key] for key in ("exp_avg", "exp_avg_sq", "step"))
            parts.append((parameter, parameter.grad, *moments))
        if self._moved(loss, [part for own in parts for part in own]):
            self._adam[loss] = Adam(
                self._library, [[_array(part) for part in own] for own in parts]
            )
        self._adam[loss].step(group["lr"], group["betas"], group["eps"])

    def move_target(self) -> None:
        """See `learner.move_target`."""
        self._average.step(self._config.target_rate)

    def _describe(self, horizon: int, size: int) -> None:
        """Tell C where all weights lie, unless it knows."""
        pairs = list(zip(self._target.parameters(), self._model.parameters(), strict=True))
        tensors = [tensor for pair in pairs for tensor in pair]
        if not self._moved("weights", tensors, horizon, size):
            return
        for tensor in tensors:
            tensor.data = tensor.data.contiguous()
        self._average = MovingAverage(self._library, [(_array(t), _array(m)) for t, m in pairs])
        self._gradients = {
            loss: torch.zeros(sum(parameter.numel() for _, parameter in parameters))
            for loss, parameters in self._trained.items()
        }
        slopes = {
            name: slope
            for loss, parameters in self._trained.items()
            for (name, _), slope in zip(parameters, self._slopes(loss), strict=True)
        }
        self._losses = Losses(
            self._library,
            *(_arrays(dict(net.named_parameters())) for net in (self._model, self._target)),
            _arrays(slopes),
            self._config,
            horizon,
            size,
        )
        self._moved("weights", tensors, horizon, size)

    def _moved(self, what: str, tensors: list[Tensor], *sizes: int) -> bool:
        """Whether some lie elsewhere, or otherwise, than they last did."""
        places = (*((t.data_ptr(), t.shape, t.stride()) for t in tensors), *sizes)
        before, self._known[what] = self._known.get(what), places
        return before != places

    def _slopes(self, loss: str) -> Iterable[Tensor]:
        """The parts of a loss's gradient, in the shapes of the parameters that it trains."""
        parameters = [parameter for _, parameter in self._trained[loss]]
        parts = self._gradients[loss].split([parameter.numel() for parameter in parameters])
        return (part.view_as(p) for part, p in zip(parts, parameters, strict=True))

    def _take_gradients(self, loss: str) -> float:
        """Clip, put the parts where they belong, and return the norm."""
        gradient = self._gradients[loss]
        norm = torch.linalg.vector_norm(gradient)
        gradient.mul_((self._config.gradient_clip / (norm + 1e-6)).clamp(max=1))
        for (_, parameter), slope in zip(self._trained[loss], self._slopes(loss), strict=True):
            parameter.grad = slope
        return norm.item()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: _array(tensor) for name, tensor in tensors.items()}
