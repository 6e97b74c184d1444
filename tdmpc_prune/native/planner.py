"""The compiled planner as an object: the weights of one agent, and buffers for its decisions.

It is told sizes and weights alone and knows nothing of agents. Shapes as in `planner.h`: M rows of
means, O observation, A action, I iterations, N + P trajectories, K elites.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, Structure, byref, c_float, c_int, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NOT_FINITE = 1  # PLANNER_NOT_FINITE
TYPES = [np.dtype(name) for name in ("float32", "float16", "int8")]  # PLANNER_FLOAT32 and so on
NARROW = 4  # samples at once, with which PyTorch's own kernels are as fast for wide networks


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
        *((name, c_int) for name in ("outputs", "inputs", "type")),
    )


class _Q(Structure):
    _fields_ = (
        ("first", _Layer),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("second", _Layer),
        ("third", _Layer),
    )


class _Model(Structure):
    _fields_ = (
        *((name, c_int) for name in ("observation", "action", "latent")),
        ("encoder", _Layer * 2),
        *((name, _Layer * 3) for name in ("dynamics", "reward", "policy")),
        ("q_ensemble", POINTER(_Q)),
        ("members", c_int),
    )


class _Config(Structure):
    _fields_ = (
        *(
            (name, c_int)
            for name in ("horizon", "means", "iterations", "samples", "policy_samples", "elites")
        ),
        *((name, c_float) for name in ("temperature", "momentum", "min_std", "max_std")),
        *((name, c_float) for name in ("policy_noise", "policy_noise_clip", "discount")),
    )


class _Key(Structure):
    _fields_ = (("seed", c_uint64), ("stream", c_uint32), ("decision", c_uint32))


_NOISE = ("samples", "sample_ends", "policy", "policy_ends", "choice", "exploration")
_DECISION = ("action", "means", "std", "value", "values", "scores")


class _Noise(Structure):
    _fields_ = tuple((name, c_void_p) for name in _NOISE)


class _Decision(Structure):
    _fields_ = tuple((name, c_void_p) for name in _DECISION)


Array = NDArray[np.float32]


class Planner:
    """An agent's planner for one environment at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: Mapping[str, Array],
        settings: Any,
        discount: float,
        seed: int = 0,
    ):
        """Take the weights as they lie: what is written to them later, counts.

        Args:
            library: of `build.library`.
            weights: a world model's state dict, C-contiguous float32 arrays. Matrices may be
                float16; or int8, then with the value of a 1 in each row as "<layer>.scale".
            settings: the planner's, with the fields of `PlannerConfig`.
            discount: per decision.
            seed: of the noise that it draws itself.
        """
        self._library, self._weights = library, dict(weights)
        self._model = self._described()
        self._sizes = {
            "iterations": settings.iterations,
            "samples": settings.samples,
            "policy_samples": settings.policy_samples,
            "elites": settings.elites,
        }
        self._config = _Config(
            horizon=settings.horizon,
            means=settings.horizon,
            **self._sizes,
            **{
                name: getattr(settings, name)
                for name in ("temperature", "momentum", "min_std", "max_std")
            },
            policy_noise=settings.policy_noise,
            policy_noise_clip=settings.policy_noise_clip,
            discount=discount,
        )
        self.min_std = settings.min_std
        actions, trajectories = self._model.action, settings.samples + settings.policy_samples
        self.observation = np.zeros(self._model.observation, np.float32)
        self.action = np.zeros(actions, np.float32)
        self.means = np.zeros((settings.horizon, actions), np.float32)
        self.std = np.zeros(actions, np.float32)
        self.value = np.zeros(1, np.float32)
        self.values = np.zeros((settings.iterations, trajectories), np.float32)
        self.scores = np.zeros(settings.elites, np.float32)
        self._decision = _Decision(*(_address(getattr(self, name)) for name in _DECISION))
        self.key = _Key(seed=seed)
        self._library.planner_workspace.restype = ctypes.c_size_t
        size = self._library.planner_workspace(byref(self._model), byref(self._config))
        self._workspace = np.zeros(size, np.uint8)
        self._noise: dict[str, Array] = {}
        # ctypes is slow at making arguments, so they are made once.
        self._arguments = (
            byref(self._model),
            byref(self._config),
            c_void_p(_address(self.observation)),
            c_void_p(_address(self.means)),
        )
        self._results = byref(self._decision), c_void_p(_address(self._workspace))
        self._drawn = None, byref(self.key)

    def plan(
        self,
        horizon: int | None = None,
        min_std: float | None = None,
        explore: bool = False,
        noise: Mapping[str, Array] | None = None,
    ) -> None:
        """Decide: from `observation` and `means` to `action`, `means`, `std`, `value` and so on.

        Args:
            horizon: planned with, at most the settings'; None takes those.
            min_std: smallest std; None takes the settings'.
            explore: add noise to the action, as training does.
            noise: from outside, named and shaped as in `planner.h`; None draws it from `key`,
                whose `decision` is for the caller to count up.

        Raises:
            ValueError: the observation is not finite; nothing is changed.
        """
        self._config.horizon = horizon or self._config.means
        self._config.min_std = self.min_std if min_std is None else min_std
        given = self._drawn
        if noise is not None:
            kept = {name: np.ascontiguousarray(noise[name], np.float32) for name in _NOISE}
            given = byref(_Noise(*(_address(kept[name]) for name in _NOISE))), None
        status = self._library.planner_plan(*self._arguments, *given, explore, *self._results)
        if status:
            raise ValueError(_meaning(status))

    def policy(self) -> None:
        """The policy's action: from `observation` to `action`. Raises ValueError: see `plan`."""
        model, _, observation, _ = self._arguments
        _, workspace = self._results
        status = self._library.planner_policy(
            model, observation, c_void_p(_address(self.action)), workspace
        )
        if status:
            raise ValueError(_meaning(status))

    def noise(self, horizon: int | None = None) -> dict[str, Array]:
        """What `plan` draws from `key` as it is."""
        steps, actions = horizon or self._config.means, self._model.action
        iterations, samples = self._config.iterations, self._config.samples
        followed = self._config.policy_samples
        shapes = {
            "samples": (iterations, steps, samples, actions),
            "sample_ends": (iterations, samples, actions),
            "policy": (steps, followed, actions),
            "policy_ends": (followed, actions),
            "choice": (1,),
            "exploration": (actions,),
        }
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._config.horizon = steps
        self._library.planner_draw(
            *self._arguments[:2],
            self._drawn[1],
            byref(_Noise(*(_address(arrays[name]) for name in _NOISE))),
            self._results[1],
        )
        return arrays

    def _described(self) -> _Model:
        """The weights as the C program has them."""
        weights = self._weights

        def layer(name: str) -> _Layer:
            matrix = weights[f"{name}.weight"]
            outputs, inputs = matrix.shape
            scale = weights.get(f"{name}.scale")
            return _Layer(
                _address(matrix),
                None if scale is None else _address(scale),
                _address(weights[f"{name}.bias"]),
                outputs,
                inputs,
                TYPES.index(matrix.dtype),
            )

        def layers(component: str, count: int) -> ctypes.Array:
            return (_Layer * count)(*(layer(f"{component}.{2 * i}") for i in range(count)))

        names = [name for name in weights if name.startswith("q_ensemble.")]
        members = list(dict.fromkeys(name.split(".")[1] for name in names))
        self._q = (_Q * len(members))(
            *(
                _Q(
                    layer(f"q_ensemble.{member}.0"),
                    _address(weights[f"q_ensemble.{member}.1.weight"]),
                    _address(weights[f"q_ensemble.{member}.1.bias"]),
                    layer(f"q_ensemble.{member}.3"),
                    layer(f"q_ensemble.{member}.5"),
                )
                for member in members
            )
        )
        networks = {name: layers(name, 3) for name in ("dynamics", "reward", "policy")}
        encoder = layers("encoder", 2)
        return _Model(
            observation=encoder[0].inputs,
            action=networks["policy"][2].outputs,
            latent=encoder[1].outputs,
            encoder=encoder,
            **networks,
            q_ensemble=self._q,
            members=len(members),
        )


def _address(array: Array) -> int:
    return array.ctypes.data


def _meaning(status: int) -> str:
    if status == _NOT_FINITE:
        return "the observation is not finite"
    return "the planner's sizes do not fit each other"
