"""MPPI in the latent space (TD-MPC, Hansen et al. 2022, section 4 and algorithm 1).

The planner keeps no state: (observations, previous means, noise) → (actions, new means). All
randomness is an input, so that it can be compiled, captured, exported, and repeated exactly; and
it is batched over environments, so that an evaluation plans all its episodes at once.

Shapes: E environments, H the horizon in decisions, N Gaussian and P policy trajectories,
K elites, I iterations, O observation, A action, D latent. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdmpc_prune.agent.config import PlannerConfig
from tdmpc_prune.agent.world_model import WorldModel


@dataclass(frozen=True)
class PlannerNoise:
    """Everything random in one decision per environment. Standard normal unless said otherwise."""

    samples: Tensor  # [I, H, E, N, A] the Gaussian action sequences
    sample_ends: Tensor  # [I, E, N, A] the policy's action at the end of each
    policy: Tensor  # [H, E, P, A] the policy trajectories
    policy_ends: Tensor  # [E, P, A] the policy's action at the end of each
    choice: Tensor  # [E] uniform in [0, 1): which elite is executed
    exploration: Tensor  # [E, A] added to the executed action in training


@dataclass(frozen=True)
class Decision:
    """What the planner decided."""

    actions: Tensor  # [E, A] in [-1, 1]: execute these
    means: Tensor  # [H, E, A]: hand these back at the next decision (zeros after a reset)
    std: Tensor  # [E, A] of the first step after the last iteration
    value: Tensor  # [E] mean value of the elites, as the model predicts it
    values: list[Tensor]  # I of [E, N + P]: of all trajectories, in every iteration
    scores: Tensor  # [E, K] of the last elites, best first; one of them was executed


def first_means(config: PlannerConfig, environments: int, action_width: int, device=None) -> Tensor:
    """The means to plan from at the start of an episode: zeros `[H, E, A]`."""
    return torch.zeros(config.horizon, environments, action_width, device=device)


def draw_noise(
    config: PlannerConfig,
    environments: int,
    action_width: int,
    generator: torch.Generator,
    horizon: int | None = None,
) -> PlannerNoise:
    """Noise for one decision in each of `environments`, on the generator's device."""
    steps = horizon or config.horizon
    shape = (environments, config.samples, action_width)
    policy_shape = (environments, config.policy_samples, action_width)
    device = generator.device

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    return PlannerNoise(
        samples=normal(config.iterations, steps, *shape),
        sample_ends=normal(config.iterations, *shape),
        policy=normal(steps, *policy_shape),
        policy_ends=normal(*policy_shape),
        choice=torch.rand(environments, generator=generator, device=device),
        exploration=normal(environments, action_width),
    )


@torch.no_grad()
def plan(
    model: WorldModel,
    observations: Tensor,
    previous_means: Tensor,
    noise: PlannerNoise,
    config: PlannerConfig,
    discount: float,
    min_std: float | Tensor | None = None,
    explore: bool = False,
) -> Decision:
    """One decision for each environment.

    Args:
        model: the world model.
        observations: `[E, O]`.
        previous_means: `[H, E, A]` from the last decision, or `first_means` after a reset.
        noise: from `draw_noise`; its horizon is the one planned with, at most `config.horizon`.
        config: the planner's settings.
        discount: per decision.
        min_std: smallest std of the sampling distribution; None takes `config.min_std`.
        explore: add the planner's own std as noise to the action, as training does.
    """
    horizon = len(noise.samples[0])
    floor = config.min_std if min_std is None else min_std
    latents = model.encode(observations).unsqueeze(1)  # [E, 1, D]

    def policy_noise(standard_normal: Tensor) -> Tensor:
        clip = config.policy_noise_clip
        return (config.policy_noise * standard_normal).clamp(-clip, clip)

    # Policy trajectories: the same in every iteration, so their values are, too.
    policy_actions, policy_values = [], []
    if config.policy_samples:
        followed, visited = follow_policy(model, latents, policy_noise(noise.policy))
        ends = policy_noise(noise.policy_ends)
        policy_actions = [followed]
        policy_values = [sequence_values(model, visited, followed, ends, discount)]

    # Warm start: the previous mean, one decision later.
    mean = torch.cat([previous_means[1:], torch.zeros_like(previous_means[:1])])[:horizon]
    std = torch.full_like(mean, config.max_std)
    start = latents.expand(-1, config.samples, -1)
    all_values = []

    for normal, ends in zip(noise.samples, policy_noise(noise.sample_ends), strict=True):
        # Sample action sequences and value them, together with the policy's.
        samples = (mean.unsqueeze(2) + std.unsqueeze(2) * normal).clamp(-1, 1)
        values = sequence_values(model, model.rollout(start, samples), samples, ends, discount)
        actions = torch.cat([samples, *policy_actions], dim=2)  # [H, E, N + P, A]
        values = torch.cat([values, *policy_values], dim=1).nan_to_num(0.0)  # [E, N + P]
        all_values.append(values)

        # Elites and their scores.
        elite_values, elites = values.topk(config.elites, dim=1)  # [E, K]
        scores = torch.softmax(config.temperature * elite_values, dim=1)
        index = elites[None, :, :, None].expand(horizon, -1, -1, actions.shape[-1])
        elite_actions = actions.gather(2, index)  # [H, E, K, A]

        # Refit the distribution.
        weights = scores[None, :, :, None]
        elite_mean = (weights * elite_actions).sum(2)  # [H, E, A]
        deviation = elite_actions - elite_mean.unsqueeze(2)
        std = (weights * deviation.square()).sum(2).sqrt()
        std = std.clamp(max=config.max_std).clamp(min=floor)
        mean = config.momentum * mean + (1 - config.momentum) * elite_mean

    # Execute an elite's first action, drawn by score.
    chosen = drawn(scores.cumsum(1), noise.choice)
    action = elite_actions[0].gather(1, chosen[:, None, None].expand(-1, 1, actions.shape[-1]))
    action = action.squeeze(1)
    if explore:
        action = (action + std[0] * noise.exploration).clamp(-1, 1)
    rest = previous_means.new_zeros(len(previous_means) - horizon, *mean.shape[1:])
    value = elite_values.mean(1)
    return Decision(action, torch.cat([mean, rest]), std[0], value, all_values, scores)


def drawn(cumulative: Tensor, choice: Tensor) -> Tensor:
    """Cumulative scores `[E, K]` and numbers `[E]` in [0, 1) → places `[E]` among the elites."""
    return (cumulative < choice.unsqueeze(1)).sum(1).clamp(max=cumulative.shape[1] - 1)


def margins(decision: Decision, choice: Tensor) -> tuple[Tensor, Tensor]:
    """How far a decision is from the ties at which it would jump to another one.

    Args:
        decision: what was decided.
        choice: `[E]` of its noise.

    Returns:
        `[I, E]` in units of value: how far apart are, in each iteration, the last elite and the
        best that is none; in the last iteration also the executed elite and those ranked next to
        it, if that is less. `[E]`: how far `choice` is from where another elite is drawn.
        Infinite where there is no other.
    """
    elites = decision.scores.shape[1]
    none = choice.new_full((len(choice), 1), torch.inf)
    steps = [
        torch.cat([none, -values.sort(1, descending=True).values.diff(dim=1), none], dim=1)
        for values in decision.values
    ]  # [E, N + P + 1]; at k: from rank k - 1 to rank k
    gaps = torch.stack([step[:, elites] for step in steps])
    cumulative = decision.scores.cumsum(1)
    place = drawn(cumulative, choice).unsqueeze(1)
    beside = steps[-1].gather(1, torch.cat([place, place + 1], dim=1)).amin(1)
    gaps[-1] = gaps[-1].minimum(beside)
    ends = torch.cat([(cumulative[:, :-1] - choice.unsqueeze(1)).abs(), none], dim=1)
    return gaps, ends.amin(1)


def follow_policy(model: WorldModel, latents: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Actions `[H, E, P, A]` and latents of the trajectories that the noisy policy takes."""
    visited = [latents.expand(-1, noise.shape[2], -1)]
    actions = []
    for step in noise:
        actions.append(model.act(visited[-1], step))
        visited.append(model.next_latent(visited[-1], actions[-1]))
    return torch.stack(actions), visited


def sequence_values(
    model: WorldModel, latents: list[Tensor], actions: Tensor, end_noise: Tensor, discount: float
) -> Tensor:
    """Discounted predicted rewards plus the discounted value at the end, `[E, N]`.

    Args:
        latents: `H + 1` tensors `[E, N, D]`.
        actions: `[H, E, N, A]`.
        end_noise: `[E, N, A]`, on the policy's action at the end.
        discount: per decision.
    """
    rewards = model.predict_reward(torch.stack(latents[:-1]), actions)  # all steps at once
    value = model.min_q(latents[-1], model.act(latents[-1], end_noise))
    for reward in rewards.flip(0):
        value = reward + discount * value
    return value


def planning_macs(model: WorldModel, config: PlannerConfig) -> int:
    """Multiply-accumulates of the matrix products in one decision."""

    def macs(component: nn.Module) -> int:
        layers = (m for m in component.modules() if isinstance(m, nn.Linear))
        return sum(layer.in_features * layer.out_features for layer in layers)

    end = macs(model.policy) + macs(model.q_ensemble)
    sampled = config.horizon * (macs(model.dynamics) + macs(model.reward)) + end
    followed = sampled + config.horizon * macs(model.policy)
    return (
        macs(model.encoder)
        + config.iterations * config.samples * sampled
        + config.policy_samples * followed
    )
