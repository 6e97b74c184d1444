"""Prioritised replay of sequences (Schaul et al. 2016; TD-MPC, Hansen et al. 2022).

A ring of transitions with a sum tree over their priorities: sampling a batch of B and updating its
priorities cost O(B log N), whatever the buffer holds. The ring is NumPy, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdmpc_prune.agent.config import LearningConfig

_SMALLEST_PRIORITY = 1e-6


@dataclass(frozen=True)
class Episode:
    """A whole episode of T decisions, as it was executed."""

    observations: np.ndarray  # [T + 1, O] float32, the last one included
    actions: np.ndarray  # [T, A] float32
    rewards: np.ndarray  # [T] float32, per decision
    terminated: bool  # ended by the task, not by a time limit

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True)
class Batch:
    """B sequences of H decisions, float32. What lies beyond an episode's end has `valid` 0."""

    observation: Tensor  # [B, O] at the start
    actions: Tensor  # [H, B, A]
    rewards: Tensor  # [H, B]
    next_observations: Tensor  # [H, B, O]
    terminated: Tensor  # [H, B] 1 where the task ended with this decision
    valid: Tensor  # [H, B]
    weights: Tensor  # [B] importance weights, the largest is 1


class SumTree:
    """Non-negative float64 weights with their sum, drawn from in O(log N).

    It is as deep as the places need that have had a weight: most of a large buffer is long empty.
    """

    def __init__(self):
        self._leaves = 1
        self._tree = np.zeros(2)  # node i has children 2i and 2i + 1

    @property
    def total(self) -> float:
        return self._tree[1]

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self._tree[self._leaves + places]

    def __setitem__(self, places: np.ndarray, weights: np.ndarray) -> None:
        last = int(places.max())
        if last >= self._leaves:
            self._grow(1 << last.bit_length())
        nodes = self._leaves + places
        self._tree[nodes] = weights
        while nodes[0] > 1:
            nodes = nodes >> 1  # twice the same is worked out twice, which is sooner than looking
            self._tree[nodes] = self._tree[2 * nodes] + self._tree[2 * nodes + 1]

    def _grow(self, leaves: int) -> None:
        """What there is becomes the left of a larger tree, level by level."""
        tree, level = np.zeros(2 * leaves), self._leaves
        while level:
            nodes = level * leaves // self._leaves
            tree[nodes : nodes + level] = self._tree[level : 2 * level]
            level //= 2
        left = leaves // self._leaves
        while left > 1:
            left //= 2
            tree[left] = tree[2 * left]
        self._leaves, self._tree = leaves, tree

    def find(self, mass: np.ndarray) -> np.ndarray:
        """The places `[B]` at which the running sum of weights exceeds `mass` `[B]`."""
        nodes = np.ones(len(mass), np.int64)
        mass = mass.copy()
        while nodes[0] < self._leaves:
            left = self._tree[2 * nodes]
            # An empty right child is never entered, whatever rounding left of the mass.
            right = (mass >= left) & (self._tree[2 * nodes + 1] > 0)
            mass -= np.where(right, left, 0)
            nodes = 2 * nodes + right
        return nodes - self._leaves


class SequenceReplay:
    """Transitions in a ring, with priorities over the places where a sequence may start.

    A decision may start a sequence if `horizon` more follow it in its episode, as published. In an
    episode that the task terminated, or that is not longer than `horizon`, every decision may, and
    what lies beyond the end is masked; else the ends that matter most would never be learnt from.
    """

    def __init__(
        self,
        capacity: int,
        observation_width: int,
        action_width: int,
        horizon: int,
        priority_exponent: float,
        priority_correction: float,
    ):
        self.capacity = capacity
        self.horizon = horizon
        self._exponent = priority_exponent
        self._correction = priority_correction
        self._observations = np.zeros((capacity, observation_width), np.float32)
        self._next_observations = np.zeros((capacity, observation_width), np.float32)
        self._actions = np.zeros((capacity, action_width), np.float32)
        self._rewards = np.zeros(capacity, np.float32)
        self._terminated = np.zeros(capacity, np.float32)
        self._left = np.zeros(capacity, np.int64)  # decisions from here to the episode's end
        self._priorities = np.zeros(capacity)  # of starts; 0 where none may start
        self._tree = SumTree()  # the same, raised to the exponent
        self._added = 0  # decisions ever added

    @classmethod
    def of(
        cls,
        config: LearningConfig,
        observation_width: int,
        action_width: int,
        capacity: int | None = None,
    ) -> SequenceReplay:
        """An empty buffer as configured; `capacity` in decisions, None takes the configured one."""
        return cls(
            capacity or config.buffer_decisions,
            observation_width,
            action_width,
            config.horizon,
            config.priority_exponent,
            config.priority_correction,
        )

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def add(self, episode: Episode) -> None:
        """Append an episode, overwriting the oldest decisions once the ring is full.

        New starts get the largest priority in the buffer, so that each is soon seen. Of an episode
        longer than the ring, the last `capacity` decisions are kept.
        """
        length = len(episode)
        kept = slice(max(0, length - self.capacity), length)
        left = np.arange(length, 0, -1)
        all_start = episode.terminated or length <= self.horizon
        may_start = np.ones(length, bool) if all_start else left > self.horizon
        terminated = np.zeros(length, np.float32)
        terminated[-1] = episode.terminated
        priorities = np.where(may_start, self._priorities.max() or 1.0, 0.0)

        places = (self._added + np.arange(length)[kept]) % self.capacity
        self._observations[places] = episode.observations[:-1][kept]
        self._next_observations[places] = episode.observations[1:][kept]
        self._actions[places] = episode.actions[kept]
        self._rewards[places] = episode.rewards[kept]
        self._terminated[places] = terminated[kept]
        self._left[places] = left[kept]
        self._store_priorities(places, priorities[kept])
        self._added += length

    def observations(self) -> np.ndarray:
        """All that is held, `[N, O]`: where each decision led to."""
        return self._next_observations[: len(self)]

    def rewarded(self) -> float:
        """The fraction of the decisions held whose reward is not what it usually is."""
        rewards = self._rewards[: len(self)]
        return float(np.mean(rewards != np.median(rewards))) if len(rewards) else 0.0

    def sample(
        self, size: int, rng: np.random.Generator, device: torch.device | str = "cpu"
    ) -> tuple[Batch, np.ndarray]:
        """Draw `size` sequences with probability proportional to priority^alpha.

        Returns:
            The sequences on `device`, and where they start (int64 `[B]`), for `set_priorities`.

        Raises:
            ValueError: the buffer holds no place where a sequence may start.
        """
        if self._tree.total <= 0:
            raise ValueError("the replay buffer is empty")
        starts = self._tree.find(rng.random(size) * self._tree.total)
        weights = self._tree[starts] ** -self._correction
        steps = np.arange(self.horizon)[:, None]
        places = (starts + steps) % self.capacity  # [H, B]
        arrays = (
            self._observations[starts],
            self._actions[places],
            self._rewards[places],
            self._next_observations[places],
            self._terminated[places],
            (steps < self._left[starts]).astype(np.float32),
            (weights / weights.max()).astype(np.float32),
        )
        return Batch(*(torch.from_numpy(array).to(device) for array in arrays)), starts

    def set_priorities(self, starts: np.ndarray, priorities: np.ndarray) -> None:
        """Give the sampled `starts` `[B]` new `priorities` `[B]`."""
        # A start that was drawn twice has the same priority twice: its loss was the same.
        self._store_priorities(starts, priorities + _SMALLEST_PRIORITY)

    def _store_priorities(self, places: np.ndarray, priorities: np.ndarray) -> None:
        self._priorities[places] = priorities
        self._tree[places] = self._priorities[places] ** self._exponent * (priorities > 0)

    def state(self) -> dict[str, np.ndarray]:
        """All that is needed to go on exactly, as arrays of the filled part of the ring."""
        filled = slice(0, len(self))
        return {
            "observations": self._observations[filled],
            "next_observations": self._next_observations[filled],
            "actions": self._actions[filled],
            "rewards": self._rewards[filled],
            "terminated": self._terminated[filled],
            "left": self._left[filled],
            "priorities": self._priorities[filled],
            "added": np.array([self._added], np.int64),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` returned, in a buffer of the same capacity and widths."""
        self._added = int(state["added"][0])
        filled = slice(0, len(self))
        self._observations[filled] = state["observations"]
        self._next_observations[filled] = state["next_observations"]
        self._actions[filled] = state["actions"]
        self._rewards[filled] = state["rewards"]
        self._terminated[filled] = state["terminated"]
        self._left[filled] = state["left"]
        if len(self):
            self._store_priorities(np.arange(len(self)), state["priorities"])
