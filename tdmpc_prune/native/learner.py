"""The compiled losses as an object: one agent's weights and gradients, and buffers for a batch.

It is told sizes and weights alone and knows nothing of agents. Shapes: B sequences of H decisions,
O observation and A action width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_long, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

TERMS = 4  # of the model's loss: consistency, reward, value, and what is minimised
_ALIGNED = 64  # bytes
_SETTINGS = ("discount", "rho", "consistency_weight", "reward_weight", "value_weight")


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "norm_weight", "norm_bias")),
        ("gradients", c_void_p * 4),
        *((name, c_int) for name in ("outputs", "inputs")),
        ("workspace", c_void_p * 9),
    )


class _Network(Structure):
    _fields_ = (("layers", _Layer * 3), ("depth", c_int))


class _Learner(Structure):
    _fields_ = (
        *((n, c_int) for n in ("observation", "action", "latent", "members", "horizon", "size")),
        *((name, c_float) for name in _SETTINGS),
        *((n, _Network) for n in ("encoder", "dynamics", "reward", "policy", "target_encoder")),
        *((name, POINTER(_Network)) for name in ("q_ensemble", "target_q_ensemble")),
        ("workspace", c_void_p * 9),
    )


_BATCH = (
    *("observation", "actions", "rewards", "next_observations"),
    *("terminated", "valid", "weights"),
)


class _Batch(Structure):
    _fields_ = tuple((name, c_void_p) for name in _BATCH)


class _Parameter(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "gradient", "mean", "square", "step")),
        ("size", c_long),
    )


Array = NDArray[np.float32]


class Losses:
    """Both losses of an agent on batches of one size, with their gradients."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: Mapping[str, Array],
        targets: Mapping[str, Array],
        gradients: Mapping[str, Array],
        settings: Any,
        horizon: int,
        size: int,
    ):
        """Take all arrays as they lie: what is written to them later, counts.

        Args:
            library: of `build.library`.
            weights: a world model's state dict, C-contiguous float32.
            targets: the target networks', of the same shapes.
            gradients: of `weights`, by the same names and of the same shapes; written to.
            settings: of learning, with the fields of `LearningConfig`.
            horizon: H.
            size: B.
        """
        self._kept = dict(weights), dict(targets), dict(gradients)
        self._library = library
        names = [name.split(".")[1] for name in weights if name.startswith("q_ensemble.")]
        members = [f"q_ensemble.{member}" for member in dict.fromkeys(names)]
        self._qs, self._target_qs = (
            (_Network * len(members))(*(_network(m, arrays, gradients) for m in members))
            for arrays in (weights, targets)
        )
        networks = {
            name: _network(name, weights, gradients)
            for name in ("encoder", "dynamics", "reward", "policy")
        }
        encoder, policy = networks["encoder"], networks["policy"]
        self._learner = _Learner(
            observation=encoder.layers[0].inputs,
            action=policy.layers[policy.depth - 1].outputs,
            latent=encoder.layers[encoder.depth - 1].outputs,
            members=len(members),
            horizon=horizon,
            size=size,
            **{name: getattr(settings, name) for name in _SETTINGS},
            **networks,
            target_encoder=_network("encoder", targets, gradients),
            q_ensemble=self._qs,
            target_q_ensemble=self._target_qs,
        )
        library.learner_workspace.restype = ctypes.c_size_t
        floats = library.learner_workspace(byref(self._learner), None)
        self._workspace = np.zeros(4 * floats + _ALIGNED, np.uint8)
        start = -self._workspace.ctypes.data % _ALIGNED + self._workspace.ctypes.data
        library.learner_workspace(byref(self._learner), c_void_p(start))

    def model_loss(self, batch: Mapping[str, Array], noise: Array) -> tuple[Array, Array]:
        """Fill the gradients of all but the policy, of the loss over H.

        Args:
            batch: named and shaped as in `replay.Batch`, C-contiguous float32.
            noise: `[H, B, A]`.

        Returns:
            The loss's `TERMS`, and priorities `[B]`.
        """
        terms = np.zeros(TERMS, np.float32)
        priorities = np.zeros(self._learner.size, np.float32)
        self._library.learner_model_loss(
            *(byref(self._learner), byref(_batch(batch)), _pointer(noise)),
            *(_pointer(terms), _pointer(priorities)),
        )
        return terms, priorities

    def policy_loss(self, batch: Mapping[str, Array], noise: Array) -> float:
        """Fill the gradients of the policy, at the latents of the last `model_loss`.

        Args:
            batch: the same.
            noise: `[H + 1, B, A]`.

        Returns:
            The loss.
        """
        loss = c_float()
        self._library.learner_policy_loss(
            byref(self._learner), byref(_batch(batch)), _pointer(noise), byref(loss)
        )
        return loss.value


class Adam:
    """Adam's step for several parameters at once."""

    def __init__(self, library: ctypes.CDLL, parameters: Sequence[Sequence[Array]]):
        """Take all arrays as they lie.

        Args:
            library: of `build.library`.
            parameters: of each its weights, gradient, `exp_avg`, `exp_avg_sq` and `step`,
                C-contiguous float32.
        """
        self._kept = [tuple(own) for own in parameters]
        self._step = library.learner_adam
        self._parameters = (_Parameter * len(self._kept))(
            *(_Parameter(*(part.ctypes.data for part in own), own[0].size) for own in self._kept)
        )

    def step(self, rate: float, betas: tuple[float, float], eps: float) -> None:
        """One step, counted in each parameter's `step`."""
        settings = (c_double(value) for value in (rate, *betas, eps))
        self._step(self._parameters, len(self._parameters), *settings)


class MovingAverage:
    """Weights that follow others."""

    def __init__(self, library: ctypes.CDLL, pairs: Sequence[tuple[Array, Array]]):
        """Take the arrays as they lie: what follows, and what it follows, C-contiguous float32."""
        self._kept = list(pairs)
        self._move = library.learner_move_target
        targets, weights = zip(*self._kept, strict=True)
        self._arguments = (
            *((c_void_p * len(a))(*(x.ctypes.data for x in a)) for a in (targets, weights)),
            (c_long * len(targets))(*(x.size for x in targets)),
            len(targets),
        )

    def step(self, rate: float) -> None:
        """target ← target + rate · (weight − target)."""
        self._move(*self._arguments, c_float(rate))


def _network(name: str, weights: Mapping[str, Array], gradients: Mapping[str, Array]) -> _Network:
    """A network as the C program has it: matrices, with the LayerNorm that may follow one."""
    network = _Network()
    places = dict.fromkeys(n.rpartition(".")[0] for n in weights if n.startswith(f"{name}."))
    for place in places:
        weight, bias = weights[f"{place}.weight"], weights[f"{place}.bias"]
        slopes = [gradients[f"{place}.{part}"].ctypes.data for part in ("weight", "bias")]
        if weight.ndim == 2:
            layer = network.layers[network.depth]
            layer.weight, layer.bias = weight.ctypes.data, bias.ctypes.data
            layer.outputs, layer.inputs = weight.shape
            layer.gradients[:2] = slopes
            network.depth += 1
        else:
            layer.norm_weight, layer.norm_bias = weight.ctypes.data, bias.ctypes.data
            layer.gradients[2:] = slopes
    return network


def _batch(arrays: Mapping[str, Array]) -> _Batch:
    return _Batch(*(arrays[name].ctypes.data for name in _BATCH))


def _pointer(array: Array) -> c_void_p:
    return c_void_p(array.ctypes.data)
