"""The update in C: both losses with their gradients, Adam and the targets' moving average (ours).

What `Learner` does with PyTorch on the other path, on the same tensors: gradients are put where
`.grad` is looked for, Adam's moments are those of `torch.optim.Adam`, and whoever cuts or replaces
tensors need not tell.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tdmpc_prune.agent.config import LearningConfig
from tdmpc_prune.agent.replay import Batch
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.native.learner import Adam, Losses, MovingAverage

Trained = Mapping[str, list[tuple[str, Tensor]]]  # loss → the parameters that it trains, by name

_ADAM = ("exp_avg", "exp_avg_sq", "step")  # what `torch.optim.Adam` keeps of a parameter


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
        self._pairs = list(zip(target.parameters(), model.parameters(), strict=True))
        self._weights = [tensor for pair in self._pairs for tensor in pair]
        self._known: dict[str, list] = {}  # where tensors lay when they were described to C
        self._gradients: dict[str, Tensor] = {}  # of each loss, all in one
        self._slopes: dict[str, list[Tensor]] = {}  # its parts, in the shapes of the parameters
        self._losses: Losses | None = None
        self._average: MovingAverage | None = None
        self._adam: dict[str, Adam] = {}

    def model_loss(self, batch: Batch, noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The gradients of all but the policy, of the loss over H, in `.grad`.

        Args:
            batch: of tensors.
            noise: `[H, B, A]`, as in `learner.model_loss`.

        Returns:
            Consistency, reward, value and total loss; priorities `[B]`.
        """
        self._describe(*batch.rewards.shape)
        terms, priorities = self._losses.model_loss(_arrays(vars(batch)), _array(noise))
        self._take_gradients("model_loss")
        return terms, priorities

    def policy_loss(self, batch: Batch, noise: Tensor) -> float:
        """The policy's gradients, in `.grad`; at the latents of the last `model_loss`.

        Args:
            batch: the same.
            noise: `[H + 1, B, A]`.

        Returns:
            The loss.
        """
        loss = self._losses.policy_loss(_arrays(vars(batch)), _array(noise))
        self._take_gradients("policy_loss")
        return loss

    def clip(self, loss: str) -> float:
        """Clip the gradients of a loss by their norm, which is returned."""
        gradient = self._gradients[loss]
        norm = torch.linalg.vector_norm(gradient).item()
        gradient *= min(1.0, self._config.gradient_clip / (norm + 1e-6))
        return norm

    def step(self, loss: str) -> None:
        """The step of a loss's optimiser."""
        optimiser = self._optimisers[loss]
        (group,) = optimiser.param_groups
        parameters = [parameter for _, parameter in self._trained[loss]]
        states = [optimiser.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:  # as it begins
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros(2, *parameter.shape)
        moments = [state[key] for state in states for key in _ADAM]
        if self._moved(loss, [*parameters, *(p.grad for p in parameters), *moments]):
            for state in states:
                state.update({key: state[key].contiguous() for key in _ADAM})
            parts = [
                [parameter, parameter.grad, *(state[key] for key in _ADAM)]
                for parameter, state in zip(parameters, states, strict=True)
            ]
            self._adam[loss] = Adam(self._library, [[*map(_array, own)] for own in parts])
        self._adam[loss].step(group["lr"], group["betas"], group["eps"])

    def move_target(self) -> None:
        """See `learner.move_target`."""
        self._average.step(self._config.target_rate)

    def _describe(self, horizon: int, size: int) -> None:
        """Tell C where all weights lie, unless it knows."""
        if not self._moved("weights", self._weights, horizon, size):
            return
        for tensor in self._weights:
            tensor.data = tensor.data.contiguous()
        pairs = [(_array(target), _array(weight)) for target, weight in self._pairs]
        self._average = MovingAverage(self._library, pairs)
        named: dict[str, Tensor] = {}
        for loss, parameters in self._trained.items():
            sizes = [parameter.numel() for _, parameter in parameters]
            self._gradients[loss] = torch.zeros(sum(sizes))
            parts = self._gradients[loss].split(sizes)
            both = list(zip(parameters, parts, strict=True))
            self._slopes[loss] = [part.view(p.shape) for (_, p), part in both]
            named |= {name: part.view(p.shape) for (name, p), part in both}
        networks = (dict(net.named_parameters()) for net in (self._model, self._target))
        arrays = [_arrays(tensors) for tensors in (*networks, named)]
        self._losses = Losses(self._library, *arrays, self._config, horizon, size)

    def _moved(self, what: str, tensors: list[Tensor], *sizes: int) -> bool:
        """Whether some lie elsewhere, or otherwise, than they last did."""
        places = [(t.data_ptr(), t.shape, t.is_contiguous()) for t in tensors]
        places += sizes
        before, self._known[what] = self._known.get(what), places
        return before != places

    def _take_gradients(self, loss: str) -> None:
        """Put the parts where they belong."""
        for (_, parameter), slope in zip(self._trained[loss], self._slopes[loss], strict=True):
            parameter.grad = slope


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: _array(tensor) for name, tensor in tensors.items()}
