"""Offline training of a cut agent against the whole one: no environment step, no reward (ours).

The student follows the teacher's open-loop latents, rewards, values and actions along the sequences
of a pool, gradients flowing through its own rollout, and, if asked to, what planners compare: the
scores of all sequences at one start, by each Q member. Each error is over the variance of what is
to be met. The student's latent channels are some of the teacher's.

A planner looks for what its networks overrate. So the student learns along its own plans too, made
anew every so often: what they promise, the teacher corrects.

Shapes as in `calibration`; Q members, D the student's latent width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdmpc_prune.agent.calibration import Pool, add_plans, compared, lessons, roll_out
from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.errors import NonFiniteLoss

_SAME = 250  # steps along the same starts and the same plans
_PLANNED = 500  # starts of a pool at which plans are made: that costs about as much as the steps
_CLIP = 10.0  # largest norm of a gradient
_LAST_RATE = 0.02  # share of the first rate at which the cosine ends


@dataclass(frozen=True)
class Teaching:
    """What a teacher computes along a pool, as far as its student can follow it."""

    observations: Tensor  # [N, O]
    actions: Tensor  # [H, N, S, A] of the sequences
    ends: Tensor  # [H + 1, N, S, A] the same, and the policy's at the end
    latents: Tensor  # [H + 1, N, S, D]
    rewards: Tensor  # [H, N, S]
    values: Tensor  # [Q, H + 1, N, S] with `ends`
    policy: Tensor  # [H + 1, N, S, A]
    scores: Tensor  # [Q, N, S] by each member, centred at each start
    discount: float
    variances: dict[str, Tensor]  # of the five above

    @staticmethod
    @torch.no_grad()
    def of(teacher: WorldModel, pool: Pool, latents: Tensor, discount: float) -> Teaching:
        """What `teacher` says along `pool`; `latents` `[D]` are its channels that a student has."""
        parts = lessons(teacher, pool)
        found = {
            "ends": torch.cat([part.ends for part in parts], 1),
            "latents": torch.cat([part.latents[..., latents] for part in parts], 1),
            "rewards": torch.cat(
                [teacher.predict_reward(part.latents[:-1], part.actions) for part in parts], 1
            ),
            "values": torch.cat(
                [torch.stack(teacher.q_values(part.latents, part.ends)) for part in parts], 2
            ),
            "policy": torch.cat([part.policy for part in parts], 1),
        }
        found["scores"] = compared(found["rewards"], found["values"][:, -1], discount)
        variances = {
            name: (value.flatten(0, -2).var(0).sum() / value.shape[-1]).clamp(min=1e-12)
            if name in ("latents", "policy")
            else value.var().clamp(min=1e-12)
            for name, value in found.items()
            if name != "ends"
        }
        return Teaching(
            pool.observations, pool.actions, discount=discount, variances=variances, **found
        )

    def latent_error(self, student: WorldModel, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The student's latents `[H + 1, B, S, D]` from these starts `[B]`, and their error."""
        reached = roll_out(student, self.observations[starts], self.actions[:, starts])
        error = (reached - self.latents[:, starts]).square().mean()
        return reached, error / self.variances["latents"]

    def error(self, student: WorldModel, starts: Tensor, scored: bool = True) -> Tensor:
        """The sum of the five errors; without that of the scores unless `scored`."""
        reached, error = self.latent_error(student, starts)
        said = {
            "rewards": student.predict_reward(reached[:-1], self.actions[:, starts]),
            "values": torch.stack(student.q_values(reached, self.ends[:, starts])),
            "policy": student.act(reached),
        }
        if scored:
            said["scores"] = compared(said["rewards"], said["values"][:, -1], self.discount)
        wanted = {
            "rewards": self.rewards[:, starts],
            "values": self.values[:, :, starts],
            "policy": self.policy[:, starts],
            "scores": self.scores[:, starts],
        }
        for name, value in said.items():
            error = error + (value - wanted[name]).square().mean() / self.variances[name]
        return error


@dataclass(frozen=True)
class Teacher:
    """A whole agent, and what its students are taught along."""

    model: WorldModel
    pool: Callable[[int], Pool]  # of each number another one
    latents: Tensor  # [D] its channels that a student has
    config: AgentConfig
    path: str  # who plans for a student, see `deciding`

    def along(self, pool: Pool) -> Teaching:
        """What it says along a pool."""
        return Teaching.of(self.model, pool, self.latents, self.config.learning.discount)

    def along_plans(self, student: WorldModel, number: int) -> Teaching:
        """What it says along a part of the pool of that number and what `student` plans there."""
        pool = self.pool(number).first(_PLANNED)
        return self.along(add_plans(pool, student, self.config, self.path, number))


def latent_steps(
    student: WorldModel,
    teaching: Teaching,
    steps: int = 300,
    rate: float = 1e-3,
    starts: int = 64,
    seed: int = 0,
) -> list[float]:
    """Train encoder and dynamics alone, on the latents alone; then the heads have to be refitted.

    Args:
        student: changed in place.
        teaching: of the agent before the cut.
        steps: of Adam; its rate falls along a cosine.
        rate: the first.
        starts: in a step.
        seed: which.

    Returns:
        The loss of each step.

    Raises:
        NonFiniteLoss: the student is as it was before.
    """
    trained = [*student.encoder.parameters(), *student.dynamics.parameters()]
    return _train(
        trained,
        lambda _: teaching,
        lambda now, chosen: now.latent_error(student, chosen)[1],
        (steps, rate, starts, seed),
    )


def distil(
    student: WorldModel,
    teacher: Teacher,
    steps: int,
    rate: float = 3e-3,
    starts: int = 32,
    seed: int = 0,
    done: int = 0,
    scored: bool = True,
) -> list[float]:
    """Train the whole student, on all that the planner and the policy say. See `latent_steps`.

    Args:
        student: changed in place.
        teacher: asked again, along another pool and the student's plans of then, every so often.
        steps: of Adam; its rate falls along a cosine.
        rate: the first.
        starts: in a step.
        seed: which; `done` is added.
        done: steps that came before; pools are numbered by steps.
        scored: on the scores, too.

    Returns:
        The loss of each step.

    Raises:
        NonFiniteLoss: the student is as it was before.
    """
    return _train(
        list(student.parameters()),
        lambda step: teacher.along_plans(student, done + step),
        lambda teaching, chosen: teaching.error(student, chosen, scored),
        (steps, rate, starts, seed + done),
    )


def _train(
    trained: Sequence[nn.Parameter],
    teaching_at: Callable[[int], Teaching],
    loss_of: Callable[[Teaching, Tensor], Tensor],
    settings: tuple[int, float, int, int],
) -> list[float]:
    steps, rate, starts, seed = settings
    generator = torch.Generator().manual_seed(seed)
    before = [parameter.detach().clone() for parameter in trained]
    optimiser = torch.optim.Adam(trained, lr=rate, fused=True)
    losses = []
    for step in range(steps):
        if step % _SAME == 0:
            teaching = teaching_at(step)
            count = len(teaching.observations)
        done = step / max(steps - 1, 1)
        share = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
        optimiser.param_groups[0]["lr"] = rate * share
        chosen = torch.randint(0, count, (min(starts, count),), generator=generator)
        loss = loss_of(teaching, chosen)
        gradients = torch.autograd.grad(loss, trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(trained, _CLIP)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            with torch.no_grad():
                for parameter, value in zip(trained, before, strict=True):
                    parameter.copy_(value)
            raise NonFiniteLoss("distillation loss", losses[-1])
        optimiser.step()
    for parameter in trained:
        parameter.grad = None
    return losses
