"""TOLD, TD-MPC's world model: encoder, latent dynamics, reward, Q ensemble and policy.

Shapes: O observation, A action and D latent width; `...` is any number of leading dimensions.
Everything is float32. The architecture is the published one (Hansen et al. 2022, appendix); only
its widths vary, per component, so that a pruned model is the same class with smaller widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdmpc_prune.agent.config import NetworkConfig
from tdmpc_prune.prunable import tag


@dataclass(frozen=True)
class Widths:
    """The structure of a world model: all that is needed to build it empty."""

    observation: int
    action: int
    latent: int
    encoder: tuple[int, ...]  # hidden widths, first layer first; the same below
    dynamics: tuple[int, ...]
    reward: tuple[int, ...]
    policy: tuple[int, ...]
    q_ensemble: tuple[tuple[int, ...], ...]  # one entry per member

    @staticmethod
    def dense(network: NetworkConfig, observation: int, action: int) -> Widths:
        """The widths of an agent that nothing has been cut from."""
        hidden = (network.hidden_width, network.hidden_width)
        return Widths(
            observation=observation,
            action=action,
            latent=network.latent_width,
            encoder=(network.encoder_width,),
            dynamics=hidden,
            reward=hidden,
            policy=hidden,
            q_ensemble=(hidden,) * network.q_members,
        )

    @staticmethod
    def of_weights(weights: Mapping[str, Tensor]) -> Widths:
        """The widths of the world model that these weights (a state dict) belong to."""

        def outputs(component: str) -> tuple[int, ...]:
            matrices = [w for name, w in weights.items() if name.startswith(f"{component}.")]
            return tuple(len(w) for w in matrices if w.dim() == 2)

        encoder, policy = outputs("encoder"), outputs("policy")
        members = dict.fromkeys(n.split(".")[1] for n in weights if n.startswith("q_ensemble."))
        return Widths(
            observation=weights["encoder.0.weight"].shape[1],
            action=policy[-1],
            latent=encoder[-1],
            encoder=encoder[:-1],
            dynamics=outputs("dynamics")[:-1],
            reward=outputs("reward")[:-1],
            policy=policy[:-1],
            q_ensemble=tuple(outputs(f"q_ensemble.{member}")[:-1] for member in members),
        )


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear-ELU for each hidden width, then Linear."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ELU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def q_function(inputs: int, hidden: tuple[int, int]) -> nn.Sequential:
    """Linear-LayerNorm-Tanh, Linear-ELU, Linear(1)."""
    first, second = hidden
    return nn.Sequential(
        nn.Linear(inputs, first),
        nn.LayerNorm(first),
        nn.Tanh(),
        nn.Linear(first, second),
        nn.ELU(),
        nn.Linear(second, 1),
    )


class WorldModel(nn.Module):
    """The five components, each a tagged module, reached through the verbs below."""

    def __init__(self, widths: Widths, generator: torch.Generator | None = None):
        """Build and initialise.

        Args:
            widths: the structure.
            generator: a CPU generator that the initial weights are drawn from.
        """
        super().__init__()
        joint = widths.latent + widths.action
        self.encoder = tag(mlp(widths.observation, widths.encoder, widths.latent), "encoder")
        self.dynamics = tag(mlp(joint, widths.dynamics, widths.latent), "dynamics")
        self.reward = tag(mlp(joint, widths.reward, 1), "reward")
        self.policy = tag(mlp(widths.latent, widths.policy, widths.action), "policy")
        self.q_ensemble = nn.ModuleList(
            tag(q_function(joint, hidden), f"q_ensemble.{member}")
            for member, hidden in enumerate(widths.q_ensemble)
        )
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator | None) -> None:
        """Orthogonal weights, zero biases, and reward and Q that start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for head in (self.reward, *self.q_ensemble):
            nn.init.zeros_(head[-1].weight)

    @property
    def widths(self) -> Widths:
        """The present structure, read off the weights, so that it is true after any surgery."""
        return Widths.of_weights(self.state_dict())

    def encode(self, observation: Tensor) -> Tensor:
        """`[..., O]` → latent `[..., D]`."""
        return self.encoder(observation)

    def next_latent(self, latent: Tensor, action: Tensor) -> Tensor:
        """`[..., D]`, `[..., A]` → the next latent `[..., D]`."""
        return self.dynamics(torch.cat([latent, action], dim=-1))

    def predict_reward(self, latent: Tensor, action: Tensor) -> Tensor:
        """`[..., D]`, `[..., A]` → reward of the decision `[...]`."""
        return self.reward(torch.cat([latent, action], dim=-1)).squeeze(-1)

    def q_values(self, latent: Tensor, action: Tensor) -> list[Tensor]:
        """`[..., D]`, `[..., A]` → each member's value `[...]`."""
        joint = torch.cat([latent, action], dim=-1)
        return [member(joint).squeeze(-1) for member in self.q_ensemble]

    def min_q(self, latent: Tensor, action: Tensor) -> Tensor:
        """`[..., D]`, `[..., A]` → the smallest of the members' values `[...]`."""
        values = self.q_values(latent, action)
        smallest = values[0]
        for value in values[1:]:
            smallest = torch.minimum(smallest, value)
        return smallest

    def act(self, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        """`[..., D]` → the policy's action `[..., A]` in [-1, 1], with `noise` `[..., A]` added."""
        action = torch.tanh(self.policy(latent))
        return action if noise is None else (action + noise).clamp(-1, 1)

    def rollout(self, latent: Tensor, actions: Tensor) -> list[Tensor]:
        """Latents `[..., D]` of times 0 to T, from the first and actions `[T, ..., A]`."""
        latents = [latent]
        for action in actions:
            latents.append(self.next_latent(latents[-1], action))
        return latents
