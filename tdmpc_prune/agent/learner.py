"""The TD-MPC update (Hansen et al. 2022, section 4.1 and algorithm 2).

Rolls the latent dynamics out over a sequence, then evaluates reward, Q, policy and target networks
once for all its steps. The losses are functions of tensors, so that they can be compiled; `Learner`
adds what changes from update to update: optimisers, target network, counters. On the native path
the same losses, their gradients and Adam are computed in C (`fused.py`), to rounding.

Shapes: B sequences of H decisions, D latent width, A action width.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc_prune.agent.config import LearningConfig, PlannerConfig
from tdmpc_prune.agent.fused import FusedUpdate
from tdmpc_prune.agent.observation_scale import ObservationScale
from tdmpc_prune.agent.replay import Batch
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import NonFiniteLoss
from tdmpc_prune.native import build
from tdmpc_prune.prunable import GradientHook

_LARGEST_LOSS = 1e4  # each loss term of a sequence, and its priority, is cut off here
_RECENT = 0.25  # share of all updates that an average is of at most
_SCALE = "scale."  # names of its tensors in a learner's state
_TOLERANCE = 1e-4  # largest difference to PyTorch, relative to a tensor's largest element


@dataclass(frozen=True)
class ModelLosses:
    """What the model loss is made of."""

    total: Tensor  # [] what is minimised, before the gradient is scaled by 1/H
    consistency: Tensor  # [] mean over the batch, as the other terms
    reward: Tensor  # []
    value: Tensor  # []
    priorities: Tensor  # [B]
    latents: Tensor  # [H + 1, B, D], detached: where the policy is improved


def model_loss(
    model: WorldModel,
    target: WorldModel,
    batch: Batch,
    policy_noise: Tensor,
    config: LearningConfig,
) -> ModelLosses:
    """The loss of encoder, dynamics, reward and Q.

    Args:
        model: the networks that learn.
        target: their moving average.
        batch: of tensors.
        policy_noise: `[H, B, A]`, on the policy's actions in the TD target.
        config: weights of the terms.
    """
    with torch.no_grad():
        consistency_targets = target.encode(batch.next_observations)
        next_latents = model.encode(batch.next_observations)
        next_values = target.min_q(next_latents, model.act(next_latents, policy_noise))
        alive = 1 - batch.terminated
        td_targets = batch.rewards + config.discount * alive * next_values

    latents = torch.stack(model.rollout(model.encode(batch.observation), batch.actions))
    rewards = model.predict_reward(latents[:-1], batch.actions)
    q_values = model.q_values(latents[:-1], batch.actions)

    step_weights = rho_weights(config, batch.valid) * batch.valid  # [H, B]
    consistency = step_weights * (latents[1:] - consistency_targets).square().mean(-1)
    reward = step_weights * (rewards - batch.rewards).square()
    td_errors = [q - td_targets for q in q_values]
    value = step_weights * sum(error.square() for error in td_errors)
    with torch.no_grad():
        priorities = (step_weights * sum(error.abs() for error in td_errors)).sum(0)

    terms = [term.sum(0).clamp(max=_LARGEST_LOSS) for term in (consistency, reward, value)]
    weights = (config.consistency_weight, config.reward_weight, config.value_weight)
    total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    return ModelLosses(
        (total * batch.weights).mean(),
        *(term.detach().mean() for term in terms),
        priorities.clamp(max=_LARGEST_LOSS),
        latents.detach(),
    )


def policy_loss(
    model: WorldModel, latents: Tensor, valid: Tensor, policy_noise: Tensor, config: LearningConfig
) -> Tensor:
    """Minus the value of the policy's actions, weighted rho^t.

    Args:
        model: its policy learns; nothing else should.
        latents: `[H + 1, B, D]`.
        valid: `[H + 1, B]`, 1 where the latent belongs to its episode.
        policy_noise: `[H + 1, B, A]`.
        config: for rho.
    """
    values = model.min_q(latents, model.act(latents, policy_noise))
    return -(rho_weights(config, values) * valid * values).mean(1).sum()


def updates_at_once(config: LearningConfig) -> int:
    """Updates that one decision brings, as a whole number."""
    return max(1, round(config.updates_per_decision))


@torch.no_grad()
def move_target(target: WorldModel, model: WorldModel, rate: float) -> None:
    """One step of the target's moving average: target ← target + rate · (model − target)."""
    torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), rate)


def rho_weights(config: LearningConfig, like: Tensor) -> Tensor:
    """rho^t as `[T, 1]`, for `like` `[T, B]`."""
    steps = torch.arange(len(like), device=like.device, dtype=like.dtype)
    return torch.pow(config.rho, steps).unsqueeze(1)


class Adam(torch.optim.Adam):
    """PyTorch's, which would import its compiler (70 MB) only to be left out of it."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


class Learner:
    """The networks that learn, their targets and optimisers, the update, and their average.

    Returns rise and fall while an agent learns; its weights averaged over the last updates (Polyak
    and Juditsky 1992) are steadier and mostly better. `average` is None where there is none yet.

    A hook in `gradient_hooks` is called as `hook(loss, parameters)` at an update, once with
    "model_loss" and once with "policy_loss", after the backward pass of that loss and before its
    optimiser step. `parameters` are those that the loss trains, with their names; their gradients
    are in `.grad`: of the weights as they are, clipped by the norm at the observations' scale.
    """

    def __init__(
        self,
        model: WorldModel,
        planner: PlannerConfig,
        config: LearningConfig,
        path: str = "torch",
        scale: ObservationScale | None = None,
    ):
        """Learn with `model`.

        Args:
            model: the networks; nothing has been learnt of them yet.
            planner: for the policy's noise.
            config: of learning.
            path: "torch", or "native": in C, on the CPU.
            scale: of the observations, as far as it is known.

        Raises:
            Unavailable: see `library`.
        """
        self.config = config
        self.model = model
        self.scale = scale
        self.target = copy.deepcopy(model).requires_grad_(False)
        self.gradient_hooks: list[GradientHook] = []
        self.updates = 0
        self.average: WorldModel | None = None
        self.averaged = 0  # models that it is of
        self._noise_std = planner.policy_noise
        self._noise_clip = planner.policy_noise_clip
        policy = {id(parameter) for parameter in model.policy.parameters()}
        named = list(model.named_parameters())
        self._trained = {  # by each loss
            "model_loss": [(name, p) for name, p in named if id(p) not in policy],
            "policy_loss": [(name, p) for name, p in named if id(p) in policy],
        }
        self.optimisers = {
            loss: Adam([p for _, p in parameters], lr=config.learning_rate, fused=True)
            for loss, parameters in self._trained.items()
        }
        self._model_loss, self._policy_loss = model_loss, policy_loss
        if self.device.type == "cuda":  # captured as CUDA graphs
            self._model_loss = torch.compile(model_loss, mode="reduce-overhead")
            self._policy_loss = torch.compile(policy_loss, mode="reduce-overhead")
        self._fused = self._fused_by(library()) if path == "native" else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def update(
        self,
        batch: Batch,
        generator: torch.Generator,
        learn: bool = True,
        watched: bool = True,
        rate: float | None = None,
    ) -> tuple[dict[str, float], np.ndarray]:
        """One update of model, policy and (when due) target networks.

        Args:
            batch: of tensors.
            generator: of the policy's noise.
            learn: False changes nothing: only the hooks see the gradients.
            watched: False leaves out the hooks.
            rate: of learning; None is as configured.

        Returns:
            Losses and gradient norms by name, and the new priorities `[B]` of the batch.

        Raises:
            NonFiniteLoss: naming the term, before any weight has changed by it.
        """
        for optimiser in self.optimisers.values():
            optimiser.param_groups[0]["lr"] = self.config.learning_rate if rate is None else rate
        horizon, size = batch.rewards.shape
        noise = torch.randn(
            2 * horizon + 1,
            size,
            batch.actions.shape[-1],
            generator=generator,
            device=generator.device,
        )
        noise = (self._noise_std * noise).clamp(-self._noise_clip, self._noise_clip)

        terms, priorities, latents = self._model_gradients(batch, noise[:horizon])
        metrics = self._checked(terms)
        self._step("model_loss", learn, watched)
        metrics |= self._checked(self._policy_gradients(batch, latents, noise[horizon:]))
        self._step("policy_loss", learn, watched)

        if not learn:
            return metrics, priorities
        self.updates += 1
        if self.updates % self.config.target_every == 0:
            if self._fused:
                self._fused.move_target()
            else:
                move_target(self.target, self.model, self.config.target_rate)
        self._move_average()
        return metrics, priorities

    def take_scale(self, observations: Tensor) -> None:
        """Learn from now on at the scale of `observations` `[N, O]`.

        The networks have learnt nothing yet, and are as if they were drawn for scaled observations.
        """
        self.scale = ObservationScale.of(observations.to(self.device))
        for network in (self.model, self.target):
            self.scale.fold(network.encoder[0])

    def _move_average(self) -> None:
        """Once per decision: of all models since it began, at most of those of the window."""
        every, window = updates_at_once(self.config), self.config.averaged_updates
        if not window or self.updates % every:
            return
        window = min(window, _RECENT * self.updates)  # early models would hold it back
        self.averaged += 1
        if self.average is None:
            self.average = copy.deepcopy(self.model).requires_grad_(False)
            self.average.zero_grad()
        move_target(self.average, self.model, min(1.0, max(every / window, 1 / self.averaged)))

    def settle(self) -> None:
        """Go on from the average, which begins anew: before a cut, it is what is cut."""
        if self.average is not None:
            self.model.load_state_dict(self.average.state_dict())
            self.average, self.averaged = None, 0

    def _model_gradients(
        self, batch: Batch, noise: Tensor
    ) -> tuple[dict[str, float], np.ndarray, Tensor | None]:
        """Fill the gradients of the model's loss: its terms, priorities, and `ModelLosses.latents`.

        The C program keeps those itself.
        """
        names = ("consistency loss", "reward loss", "value loss", "model loss")
        if self._fused:
            terms, priorities = self._fused.model_loss(batch, noise)
            named = dict(zip(names, terms.tolist(), strict=True))
            return named | {"model gradient norm": self._clip("model_loss")}, priorities, None
        if self.device.type == "cuda":  # what the last update's graphs returned is done with
            torch.compiler.cudagraph_mark_step_begin()
        losses = self._model_loss(self.model, self.target, batch, noise, self.config)
        norm = self._backward("model_loss", losses.total / len(batch.rewards))
        terms = (losses.consistency, losses.reward, losses.value, losses.total, norm)
        values = dict(zip((*names, "model gradient norm"), _values(*terms), strict=True))
        return values, losses.priorities.cpu().numpy(), losses.latents

    def _policy_gradients(
        self, batch: Batch, latents: Tensor | None, noise: Tensor
    ) -> dict[str, float]:
        """Fill the gradients of the policy's loss: its terms."""
        if self._fused:
            values = self._fused.policy_loss(batch, noise), self._clip("policy_loss")
        else:
            # A latent belongs to its episode if the decision that led to it does.
            valid = torch.cat([torch.ones_like(batch.valid[:1]), batch.valid])
            loss = self._policy_loss(self.model, latents, valid, noise, self.config)
            values = _values(loss, self._backward("policy_loss", loss))
        return dict(zip(("policy loss", "policy gradient norm"), values, strict=True))

    def _backward(self, name: str, loss: Tensor) -> Tensor:
        """Fill the gradients of the parameters that a loss trains, clip, and return their norm."""
        parameters = [parameter for _, parameter in self._trained[name]]
        for parameter in parameters:
            parameter.grad = None
        loss.backward(inputs=parameters)
        return self._clip(name)

    def _clip(self, loss: str) -> Tensor | float:
        """Clip the gradients of a loss by their norm, which is returned."""
        scaled = self.scale is not None and loss == "model_loss"
        with self.scale.scaled_gradient(self.model.encoder[0]) if scaled else nullcontext():
            if self._fused:
                return self._fused.clip(loss)
            parameters = [parameter for _, parameter in self._trained[loss]]
            return nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)

    @staticmethod
    def _checked(terms: dict[str, float]) -> dict[str, float]:
        for term, value in terms.items():
            if not math.isfinite(value):
                raise NonFiniteLoss(term, value)
        return terms

    def _fused_by(self, library: ctypes.CDLL) -> FusedUpdate:
        parts = (self.model, self.target, self._trained, self.optimisers, self.config)
        return FusedUpdate(library, *parts)

    def _step(self, loss: str, learn: bool, watched: bool) -> None:
        for hook in self.gradient_hooks if watched else ():
            hook(loss, self._trained[loss])
        if not learn:
            return
        step = partial(self._fused.step, loss) if self._fused else self.optimisers[loss].step
        if self.scale is not None and loss == "model_loss":
            self.scale.step(self.model.encoder[0], step)
        else:
            step()

    def state(self) -> dict[str, Tensor]:
        """Target weights, both optimisers' moments, by the names of their parameters, and scale."""
        tensors = {f"target.{name}": value for name, value in self.target.state_dict().items()}
        if self.scale is not None:
            tensors |= {f"{_SCALE}{name}": value for name, value in vars(self.scale).items()}
        for loss, parameters in self._trained.items():
            for name, parameter in parameters:
                for key, value in self.optimisers[loss].state[parameter].items():
                    tensors[f"adam.{key}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go on from what `state` returned; the model's own weights are loaded separately."""
        self.updates = updates
        scale = {
            name.removeprefix(_SCALE): value.to(self.device)
            for name, value in tensors.items()
            if name.startswith(_SCALE)
        }
        if scale:
            self.scale = ObservationScale(**scale)
        prefix = "target."
        self.target.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        for loss, parameters in self._trained.items():
            for name, parameter in parameters:
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"adam.{key}.{name}" in tensors:
                        value = tensors[f"adam.{key}.{name}"].to(parameter.device)
                        self.optimisers[loss].state[parameter][key] = value


def update_macs(model: WorldModel, config: LearningConfig) -> int:
    """About how many multiply-accumulates the matrix products of one update are.

    A layer's backward pass is counted as two forward passes, or as one where it only passes
    gradients on (Q, for the policy's loss).
    """
    encoder, dynamics, reward, policy, q = (
        sum(weight.numel() for name, weight in part.named_parameters() if weight.dim() == 2)
        for part in (model.encoder, model.dynamics, model.reward, model.policy, model.q_ensemble)
    )
    horizon = config.horizon
    targets = horizon * (2 * encoder + policy + q)
    model_loss = 3 * (encoder + horizon * (dynamics + reward + q))
    policy_loss = (horizon + 1) * (3 * policy + 2 * q)
    return config.batch * (targets + model_loss + policy_loss)


def library() -> ctypes.CDLL:
    """The compiled losses. Raises Unavailable: see `build.library`."""
    return build.library(_difference, build.LEARNER)


def unavailable() -> str | None:
    """Why updates in C cannot be had on this machine; None if they can."""
    try:
        library()
    except build.Unavailable as error:
        return str(error)
    return None


def _values(*terms: Tensor) -> list[float]:
    return torch.stack([term.detach() for term in terms]).tolist()


def _difference(loaded: ctypes.CDLL) -> str | None:
    """What is wrong with losses that were just compiled: they must be as PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    widths = Widths(5, 2, 7, (19,), (23, 9), (8, 11), (13, 6), ((10, 17), (12, 5)))
    config, steps, size = LearningConfig(gradient_clip=0.5), 3, 43
    model = WorldModel(widths, generator)
    with torch.no_grad():
        for parameter in model.parameters():  # heads that start at zero tell nothing
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours, theirs = (Learner(copy.deepcopy(model), PlannerConfig(), config) for _ in range(2))
    theirs._fused = theirs._fused_by(loaded)
    gradients: dict[str, Tensor] = {}
    wrong = [0.0]

    def compare(one: Tensor, other: Tensor) -> None:
        gap = (one - other).abs().max() / one.abs().max().clamp(min=1e-3)
        wrong.append(float(gap.nan_to_num(nan=math.inf)))

    def remember(_: str, parameters: list[tuple[str, Tensor]]) -> None:
        gradients.update((name, parameter.grad) for name, parameter in parameters)

    def look(_: str, parameters: list[tuple[str, Tensor]]) -> None:
        for name, parameter in parameters:
            compare(gradients[name], parameter.grad)
            parameter.grad.copy_(gradients[name])  # Adam would make much of a small difference

    ours.gradient_hooks.append(remember)
    theirs.gradient_hooks.append(look)
    for number in range(3):
        batch = Batch(
            observation=torch.randn(size, 5, generator=generator),
            actions=torch.randn(steps, size, 2, generator=generator).clamp(-1, 1),
            rewards=torch.randn(steps, size, generator=generator),
            next_observations=torch.randn(steps, size, 5, generator=generator),
            terminated=(torch.rand(steps, size, generator=generator) < 0.2).float(),
            valid=(torch.rand(steps, size, generator=generator) < 0.8).float(),
            weights=torch.rand(size, generator=generator),
        )
        results = [
            learner.update(batch, generator.manual_seed(number)) for learner in (ours, theirs)
        ]
        for one, other in zip(*results, strict=True):
            parts = (
                zip(one.values(), other.values(), strict=True)
                if isinstance(one, dict)
                else ((one, other),)
            )
            for a, b in parts:
                compare(torch.as_tensor(a), torch.as_tensor(b))
    for name in ("model", "target"):
        pairs = zip(
            getattr(ours, name).parameters(), getattr(theirs, name).parameters(), strict=True
        )
        for one, other in pairs:
            compare(one.detach(), other.detach())
    return f"differs from PyTorch by {max(wrong):.1e}" if max(wrong) > _TOLERANCE else None
