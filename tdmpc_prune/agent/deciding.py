"""Who decides for an agent: PyTorch (`planner.plan`), or the same planner in C.

Either takes observations and means to a `Decision`. They compute the same; PyTorch draws its noise
from a generator, the C planner from a seed and the number of the decision, so that the runs they
make differ by their noise, and each can be repeated and resumed exactly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdmpc_prune.agent.config import AgentConfig, PlannerConfig
from tdmpc_prune.agent.learner import unavailable as cannot_learn
from tdmpc_prune.agent.planner import (
    Decision,
    PlannerNoise,
    draw_noise,
    first_means,
    margins,
    plan,
)
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import UserError
from tdmpc_prune.native import build
from tdmpc_prune.native.planner import NARROW, Planner

_WIDE = 64  # units, from which PyTorch is as fast as a planner of 4 samples at once
_TOLERANCE = 1e-4  # largest difference to PyTorch of a decision that hangs on no tie
_CHECKED = 32
WHO = {"native": "the planner in C", "torch": "PyTorch"}


@dataclass(frozen=True)
class Choice:
    """Who decides, and why not the C planner where it would have been wanted."""

    path: str  # "native" or "torch"
    because: str | None = None

    def text(self) -> str:
        """One line."""
        because = f", because {self.because}" if self.because else ""
        return f"decisions by {WHO[self.path]}{because}"


def choose(decisions: str, widths: Widths, device: torch.device, learning: bool = False) -> Choice:
    """Who decides on this machine.

    Args:
        decisions: "auto", "native" or "torch".
        widths: of the networks, before they are cut.
        device: on which they lie.
        learning: they learn too, on the same path.

    Raises:
        UserError: the C planner was asked for and cannot decide here.
    """
    if decisions == "torch":
        return Choice("torch")
    because = None
    if device.type != "cpu":
        because = f"the networks are on {device.type}"
    elif reason := unavailable() or (cannot_learn() if learning else None):
        because = reason
    elif decisions == "auto" and library().planner_width() <= NARROW:
        widest = max(widths.dynamics + widths.reward + widths.policy + widths.q_ensemble[0])
        if widest > _WIDE:
            because = "this processor's vectors are too short for networks so wide"
    if because is None:
        return Choice("native")
    if decisions == "native":
        raise UserError(f"decisions=native cannot be, because {because}; take decisions=torch")
    return Choice("torch", because)


def library() -> ctypes.CDLL:
    """The compiled planner. Raises Unavailable: see `build.library`."""
    return build.library(_difference)


def unavailable() -> str | None:
    """Why the planner in C cannot be had on this machine; None if it can."""
    try:
        library()
    except build.Unavailable as error:
        return str(error)
    return None


class TorchDeciding:
    """`planner.plan`, with noise from a generator."""

    def __init__(
        self,
        model: WorldModel,
        config: AgentConfig,
        generator: torch.Generator,
        planned: Callable[..., Decision] = plan,
    ):
        """Decide with `model` on its device; `planned` is `plan`, or what it was compiled to."""
        self._model, self._config = model, config
        self._generator, self._plan = generator, planned

    def decide(
        self,
        observations: Tensor,
        means: Tensor,
        streams: Sequence[int] = (0,),
        decision: int = 0,
        horizon: int | None = None,
        min_std: float | None = None,
        explore: bool = False,
    ) -> Decision:
        """See `plan`. The generator goes on, whatever `streams` and `decision` are."""
        planner, discount = self._config.planner, self._config.learning.discount
        width = means.shape[-1]
        noise = draw_noise(planner, len(observations), width, self._generator, horizon)
        floor = None if min_std is None else torch.tensor(min_std, device=means.device)
        return self._plan(
            self._model, observations, means, noise, planner, discount, floor, explore=explore
        )


class NativeDeciding:
    """The planner in C, with noise from a seed."""

    def __init__(self, model: WorldModel, config: AgentConfig, seed: int):
        """Decide with the weights of `model` as they are at each decision, in its present widths.

        Raises:
            Unavailable: see `build.library`.
        """
        self._kept = {n: w.detach().contiguous() for n, w in model.state_dict().items()}
        weights = {name: tensor.numpy() for name, tensor in self._kept.items()}
        self.planner = Planner(library(), weights, config.planner, config.learning.discount, seed)

    def decide(
        self,
        observations: Tensor,
        means: Tensor,
        streams: Sequence[int] = (0,),
        decision: int = 0,
        horizon: int | None = None,
        min_std: float | None = None,
        explore: bool = False,
        noise: PlannerNoise | None = None,
    ) -> Decision:
        """See `plan`.

        Args:
            observations: `[E, O]`.
            means: `[H, E, A]`.
            streams: `[E]`, which noise is for which environment.
            decision: its number; the noise follows from seed, stream and it.
            horizon: planned with.
            min_std: smallest std.
            explore: add noise to the action.
            noise: instead of its own.
        """
        planner, results = self.planner, []
        for place, stream in enumerate(streams):
            planner.observation[:] = observations[place].numpy()
            planner.means[:] = means[:, place].numpy()
            planner.key.stream, planner.key.decision = stream, decision
            planner.plan(horizon, min_std, explore, noise and _of_one(noise, place))
            parts = (planner.action, planner.means, planner.std, planner.value)
            results.append([part.copy() for part in (*parts, planner.values, planner.scores)])
        actions, after, std, value, values, scores = (
            torch.from_numpy(np.stack(part)) for part in zip(*results, strict=True)
        )
        return Decision(
            actions,
            after.transpose(0, 1).contiguous(),
            std,
            value.squeeze(1),
            list(values.unbind(1)),
            scores,
        )


Deciding = TorchDeciding | NativeDeciding


def deciding(
    path: str,
    model: WorldModel,
    config: AgentConfig,
    seed: int,
    generator: torch.Generator | None = None,
    planned: Callable[..., Decision] = plan,
) -> Deciding:
    """Who decides on a path that `choose` found.

    Args:
        path: "native" or "torch".
        model: the networks.
        config: the agent's.
        seed: of the noise.
        generator: of PyTorch's noise; None makes one from `seed`.
        planned: see `TorchDeciding`.
    """
    if path == "native":
        return NativeDeciding(model, config, seed)
    device = next(model.parameters()).device
    generator = generator or torch.Generator(device).manual_seed(seed)
    return TorchDeciding(model, config, generator, planned)


def _of_one(noise: PlannerNoise, place: int) -> dict[str, np.ndarray]:
    """One environment's noise."""
    parts = {
        "samples": noise.samples[:, :, place],
        "sample_ends": noise.sample_ends[:, place],
        "policy": noise.policy[:, place],
        "policy_ends": noise.policy_ends[place],
        "choice": noise.choice[place : place + 1],
        "exploration": noise.exploration[place],
    }
    return {name: part.numpy() for name, part in parts.items()}


def _difference(loaded: ctypes.CDLL) -> str | None:
    """What is wrong with a planner that was just compiled: it must decide as PyTorch does."""
    planner = PlannerConfig(horizon=3, iterations=3, samples=40, elites=6, policy_fraction=0.1)
    generator = torch.Generator().manual_seed(0)
    widths = Widths(5, 2, 7, (19,), (23, 9), (8, 11), (13, 6), ((10, 17), (12, 5)))
    model = WorldModel(widths, generator)
    with torch.no_grad():
        for parameter in model.parameters():  # heads that start at zero tell nothing
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    native, wrong = Planner(loaded, weights, planner, 0.99), 0.0
    for _ in range(_CHECKED):
        observation = torch.randn(1, widths.observation, generator=generator)
        means = 0.3 * torch.randn(first_means(planner, 1, widths.action).shape, generator=generator)
        noise = draw_noise(planner, 1, widths.action, generator)
        ours = plan(model, observation, means, noise, planner, 0.99)
        gaps, end = margins(ours, noise.choice)
        if min(gaps.min(), end.min()) < _TOLERANCE:
            continue
        native.observation[:], native.means[:] = observation[0].numpy(), means[:, 0].numpy()
        native.plan(noise=_of_one(noise, 0))
        pairs = ((ours.actions[0], native.action), (ours.means[:, 0], native.means))
        for one, other in pairs:
            wrong = max(wrong, float(np.nan_to_num(np.abs(one.numpy() - other), nan=np.inf).max()))
    return f"differs from PyTorch by {wrong:.1e}" if wrong > _TOLERANCE else None
