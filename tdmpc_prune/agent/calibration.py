"""The data by which a cut agent is made good, and what of it matters: what the planner compares.

From states of the replay buffer start action sequences of the kinds that the planner tries: the
executed ones, with and without noise, the policy's, and wide ones; and, while a cut agent learns,
those that it would plan itself, where it errs in its own favour. A fit is asked to be right where
plans are made, not only where the agent has been (ours).

Shapes: N starts, S sequences at each, H the horizon in decisions; widths O observation, A action,
D latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc_prune.agent.config import AgentConfig
from tdmpc_prune.agent.deciding import deciding
from tdmpc_prune.agent.planner import first_means, follow_policy
from tdmpc_prune.agent.replay import SequenceReplay
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Calibration, Channels, Stage

_RECENT = 0.4  # of the starts: the newest ones, which every other draw is from
_NOISE = (0.0, 0.5, 1.0)  # standard deviations added to the executed actions
_POLICY_NOISE = (0.05, 0.3)  # and to the policy's, along its own rollout
_WIDE = 3  # sequences that have nothing to do with either
_WIDE_STD = (0.1, 2.0)
SEQUENCES = len(_NOISE) + len(_POLICY_NOISE) + _WIDE
_PLAN_NOISE = (0.0, 0.1, 0.1, 0.3, 0.3, 0.3, 0.6, 0.6)  # around a plan
_BATCH = 100  # starts
_LARGEST_TARGET = 3.0  # of the policy before its tanh: what lies beyond is saturated
_LEAST_WEIGHT = 0.05  # of a row whose actions are


@dataclass(frozen=True)
class Pool:
    """States to start from, and action sequences to follow there."""

    observations: Tensor  # [N, O]
    actions: Tensor  # [H, N, S, A] in [-1, 1]

    def first(self, starts: int) -> Pool:
        """Its first starts; they lie in no order."""
        return Pool(self.observations[:starts], self.actions[:, :starts])


@dataclass(frozen=True)
class Lesson:
    """A part of a pool, and what the whole agent computes along it."""

    whole: WorldModel
    observations: Tensor  # [N, O]
    actions: Tensor  # [H, N, S, A]
    latents: Tensor  # [H + 1, N, S, D] open loop
    policy: Tensor  # [H + 1, N, S, A] the policy's actions there
    score_signs: Tensor  # [N, S] random
    action_signs: Tensor  # [N, S, A]

    @property
    def ends(self) -> Tensor:
        """`[H + 1, N, S, A]` the sequences' actions, and the policy's at the end."""
        return torch.cat([self.actions, self.policy[-1:]])


@torch.no_grad()
def draw_pool(
    model: WorldModel, replay: SequenceReplay, horizon: int, starts: int, seed: int = 0
) -> Pool:
    """Draw starts from the replay buffer, half from all of it and half from its newest part.

    Args:
        model: the agent before it is cut; its policy gives some of the sequences.
        replay: what it has seen.
        horizon: decisions of a sequence.
        starts: N, at most; of a small buffer two for each state.
        seed: of starts and noise.

    Raises:
        UserError: the buffer holds no sequence of that length.
    """
    held = replay.state()
    count = len(held["left"])
    oldest = int(held["added"][0]) % count if count else 0
    by_age = (oldest + np.arange(count)) % max(count, 1)
    may_start = by_age[held["left"][by_age] > horizon]
    if not len(may_start):
        raise UserError(
            f"the replay buffer holds no {horizon + 1} decisions in a row ({count} in all): there "
            f"is nothing to calibrate with; resume from a run's folder, or play episodes first"
        )
    starts = min(starts, 2 * len(may_start))
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    newest = may_start[-max(1, int(_RECENT * len(may_start))) :]
    chosen = np.empty(starts, np.int64)
    chosen[::2] = rng.choice(may_start, len(chosen[::2]))
    chosen[1::2] = rng.choice(newest, len(chosen[1::2]))
    places = (chosen + np.arange(horizon)[:, None]) % replay.capacity
    executed = torch.from_numpy(held["actions"][places]).unsqueeze(2)  # [H, N, 1, A]
    device = next(model.parameters()).device
    observations = torch.from_numpy(held["observations"][chosen]).to(device)

    def normal(sequences: int) -> Tensor:
        shape = (horizon, len(chosen), sequences, executed.shape[-1])
        return torch.randn(shape, generator=generator)

    noisy = executed + torch.tensor(_NOISE)[:, None] * normal(len(_NOISE))
    latents = model.encode(observations).unsqueeze(1)
    noise = torch.tensor(_POLICY_NOISE)[:, None] * normal(len(_POLICY_NOISE))
    followed, _ = follow_policy(model, latents, noise.to(device))
    low, high = _WIDE_STD
    shape = (len(chosen), _WIDE, 1)
    std = low + (high - low) * torch.rand(shape, generator=generator)
    mean = 2 * torch.rand((horizon, *shape[:2], executed.shape[-1]), generator=generator) - 1
    wide = mean + std * normal(_WIDE)
    drawn = torch.cat([noisy, followed.cpu(), wide], 2).clamp(-1, 1)
    return Pool(observations, drawn.to(device))


@torch.no_grad()
def add_plans(pool: Pool, model: WorldModel, config: AgentConfig, path: str, seed: int = 0) -> Pool:
    """With what `model` plans at each start, and what lies around it: actions `[H, N, S + 8, A]`.

    Args:
        pool: from `draw_pool`.
        model: plans, as it would in an episode's first decision.
        config: planner and discount.
        path: who plans, see `deciding`.
        seed: of the planner's noise and the noise around plans.
    """
    count, width = len(pool.observations), pool.actions.shape[-1]
    device = pool.observations.device
    planner = deciding(path, model, config, seed)
    made = []
    for first in range(0, count, _BATCH):
        observations = pool.observations[first : first + _BATCH]
        means = first_means(config.planner, len(observations), width, device)
        streams = range(first, first + len(observations))
        made.append(planner.decide(observations, means, streams).means)
    plans = torch.cat(made, 1)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(plans), count, len(_PLAN_NOISE), width)
    noise = torch.tensor(_PLAN_NOISE)[:, None] * torch.randn(shape, generator=generator)
    around = (plans.unsqueeze(2) + noise.to(device)).clamp(-1, 1)
    return Pool(pool.observations, torch.cat([pool.actions, around], 2))


@torch.no_grad()
def lessons(model: WorldModel, pool: Pool, seed: int = 0) -> list[Lesson]:
    """What the whole agent computes along a pool, in at least ten parts if there are ten starts."""
    size = min(_BATCH, max(1, len(pool.observations) // 10))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for observations, actions in zip(
        pool.observations.split(size), pool.actions.split(size, 1), strict=True
    ):
        latents = roll_out(model, observations, actions)
        policy = model.act(latents)
        signs = [
            (torch.randint(0, 2, shape, generator=generator).float() * 2 - 1).to(latents.device)
            for shape in (policy.shape[1:3], policy.shape[1:])
        ]
        found.append(Lesson(model, observations, actions, latents, policy, *signs))
    return found


def agent_calibration(model: WorldModel, pool: Pool, config: AgentConfig) -> Calibration:
    """How a cut agent is fitted: encoder, dynamics on what the whole one passes through, heads on
    the cut agent's own rollout.

    Args:
        model: the agent before it is cut.
        pool: from `draw_pool`.
        config: for the discount.
    """
    discount = config.learning.discount
    writer = _layers(model.encoder, "encoder")[-1]  # of the latent

    def encode(network: WorldModel, lesson: Lesson, channels: Channels) -> None:
        network.encode(lesson.observations)

    def reached(network: WorldModel, lesson: Lesson, channels: Channels) -> Tensor:
        """`[H, N, S, D]`, what the whole agent reaches, but first the network's own latent."""
        first = network.encode(lesson.observations).unsqueeze(1)
        first = first.expand(-1, lesson.actions.shape[2], -1).unsqueeze(0)
        return torch.cat([first, lesson.latents[1:-1, ..., channels[writer]]])

    def follow(network: WorldModel, lesson: Lesson, channels: Channels) -> None:
        network.next_latent(reached(network, lesson, channels), lesson.actions)

    def follow_to(wave, network: WorldModel, lesson: Lesson, channels: Channels) -> None:
        joint = torch.cat([reached(network, lesson, channels), lesson.actions], -1)
        _run_to(wave, network, {"dynamics": [joint]})

    def use(network: WorldModel, lesson: Lesson, channels: Channels) -> None:
        latents = roll_out(network, lesson.observations, lesson.actions)
        network.predict_reward(latents[:-1], lesson.actions)
        network.act(latents)
        network.q_values(latents, lesson.ends)
        network.q_values(latents, lesson.policy)

    def use_to(wave, network: WorldModel, lesson: Lesson, channels: Channels) -> None:
        latents = lesson.latents
        if network is not lesson.whole:
            latents = roll_out(network, lesson.observations, lesson.actions)
        joint = [torch.cat([latents, actions], -1) for actions in (lesson.ends, lesson.policy)]
        inputs = {f"q_ensemble.{k}": joint for k in range(len(network.q_ensemble))}
        inputs["reward"] = [torch.cat([latents[:-1], lesson.actions], -1)]
        inputs["policy"] = [latents]
        _run_to(wave, network, inputs)

    def saturating(outputs: Tensor) -> tuple[Tensor, Tensor]:
        slope = (1 - outputs.tanh().square()).mean(1)
        return outputs.clamp(-_LARGEST_TARGET, _LARGEST_TARGET), slope.square() + _LEAST_WEIGHT

    heads = [_layers(model.reward, "reward"), _layers(model.policy, "policy")]
    last = heads[1][-1]
    heads += [_layers(q, f"q_ensemble.{k}") for k, q in enumerate(model.q_ensemble)]
    waves = [
        tuple(head[depth] for head in heads if depth < len(head))
        for depth in range(max(map(len, heads)))
    ]
    taught = lessons(model, pool)
    with torch.no_grad():  # or the graphs of all parts would be in memory at once
        score_scale = torch.cat([_compared(model, lesson, discount) for lesson in taught]).std()
    action_scale = torch.cat([lesson.policy[0].flatten(0, 1) for lesson in taught]).var(0).mean()
    action_scale = (action_scale * model.widths.action).sqrt().clamp(min=1e-6)

    def felt(network: WorldModel, lesson: Lesson) -> Tensor:
        """Scores as the planner compares them, and the policy's actions, with random signs."""
        scores = _compared(network, lesson, discount) / score_scale.clamp(min=1e-6)
        latents = network.encode(lesson.observations).unsqueeze(1)
        actions = network.act(latents.expand(-1, lesson.actions.shape[2], -1)) / action_scale
        return (lesson.score_signs * scores).sum() + (lesson.action_signs * actions).sum()

    return Calibration(
        batches=lambda whole: lessons(whole, pool),
        stages=(
            Stage(_one_by_one(model.encoder, "encoder"), encode),
            Stage(_one_by_one(model.dynamics, "dynamics"), follow, as_far_as=follow_to),
            Stage(tuple(waves), use, {last: saturating}, use_to),
        ),
        sensitivity=felt,
    )


def _run_to(
    wave: tuple[str, ...], network: WorldModel, inputs: Mapping[str, Sequence[Tensor]]
) -> None:
    """Run the components of some layers, each on its `inputs`, down to these layers."""
    for layer in wave:
        part, _, place = layer.rpartition(".")
        for given in inputs[part]:
            network.get_submodule(part)[: int(place) + 1](given)


def roll_out(model: WorldModel, observations: Tensor, actions: Tensor) -> Tensor:
    """Open-loop latents `[H + 1, N, S, D]` from observations `[N, O]` along `[H, N, S, A]`."""
    first = model.encode(observations).unsqueeze(1).expand(-1, actions.shape[2], -1)
    return torch.stack(model.rollout(first, actions))


def _compared(network: WorldModel, lesson: Lesson, discount: float) -> Tensor:
    """The sequences' scores `[N, S]`, see `compared`."""
    latents = roll_out(network, lesson.observations, lesson.actions)
    rewards = network.predict_reward(latents[:-1], lesson.actions)
    return compared(rewards, network.min_q(latents[-1], lesson.policy[-1]), discount)


def compared(rewards: Tensor, value: Tensor, discount: float) -> Tensor:
    """Scores `[..., N, S]`, centred at each start: the planner only compares there.

    Args:
        rewards: `[H, N, S]`.
        value: `[..., N, S]` of the end.
        discount: per decision.
    """
    score = value
    for reward in rewards.flip(0):
        score = reward + discount * score
    return score - score.mean(-1, keepdim=True)


def _layers(part: nn.Module, name: str) -> list[str]:
    """The layers of a component, in the order in which they run."""
    return [
        f"{name}.{place}" for place, module in part.named_children() if list(module.parameters())
    ]


def _one_by_one(part: nn.Module, name: str) -> tuple[tuple[str, ...], ...]:
    return tuple((layer,) for layer in _layers(part, name))


def is_head(layer: str) -> bool:
    """Whether a layer reads latents and writes none: what is fitted again after latent steps."""
    return layer.partition(".")[0] in ("reward", "policy", "q_ensemble")


def last_layers(model: WorldModel) -> set[str]:
    """The last layer of each component: no activation follows it."""
    parts = {name: getattr(model, name) for name in ("encoder", "dynamics", "reward", "policy")}
    parts |= {f"q_ensemble.{k}": q for k, q in enumerate(model.q_ensemble)}
    return {_layers(part, name)[-1] for name, part in parts.items()}


def latent_channels(channels: Channels, model: WorldModel) -> Tensor:
    """The latent's channels among the output channels of all layers."""
    return channels[_layers(model.encoder, "encoder")[-1]]
