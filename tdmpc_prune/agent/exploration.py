"""What an agent tries while it learns: pink noise, and a bonus for what it has rarely seen.

Nothing here keeps a state: the noise of an episode follows from a seed, the bonus from what the
replay buffer holds. A run that is resumed therefore goes on with the same numbers.

Shapes: T decisions, A action, O observation, N decisions of the buffer, F features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RANDOM_STD = 0.6  # of the pink noise that the first actions are
_FEATURES = 256
_SMALLEST_DEVIATION = 1e-3  # of an observation's element: what hardly moves, tells nothing

Array = NDArray[np.float32]


def pink_noise(decisions: int, actions: int, rng: np.random.Generator) -> Array:
    """Noise whose power falls with frequency: it pushes one way, now for long, now for short.

    Eberhard et al. 2023; in planners iCEM, Pinneri et al. 2020, section 3.1.

    Args:
        decisions: T, at least 2.
        actions: A, each with noise of its own.
        rng: where it comes from.

    Returns:
        float32 `[T, A]`, of mean 0 and std 1.
    """
    waves = np.fft.rfft(rng.standard_normal((decisions, actions)), axis=0)
    share = 1 / np.maximum(np.arange(len(waves)), 1)  # the mean is as strong as the slowest wave
    power = np.full(len(waves), 2.0)  # each stands for two, but the mean and the fastest
    power[0] -= 1
    power[-1] -= decisions % 2 == 0
    std = np.sqrt((power * share).sum() / decisions)
    return (np.fft.irfft(waves * np.sqrt(share)[:, None], decisions, axis=0) / std).astype(
        np.float32
    )


class Novelty:
    """How little is known of an observation, in (0, 1]: about 1 / sqrt(visits) of the like.

    The elliptic bonus sqrt(f' (1 + sum f f')^-1 f) (Auer 2002; Henaff et al. 2022) with random
    Fourier features f (Rahimi and Recht 2007) of observations divided by their deviations.
    """

    def __init__(self, observations: Array, seed: int):
        """What `observations` `[N, O]` leave unknown; `seed` is of the features."""
        rng = np.random.default_rng(seed)
        deviation = np.maximum(observations.std(0), _SMALLEST_DEVIATION)
        width = observations.shape[1]
        self._waves = (
            rng.standard_normal((width, _FEATURES)) * 2 / (np.sqrt(width) * deviation[:, None])
        )
        self._phases = rng.uniform(0, 2 * np.pi, _FEATURES)
        features = self._features(observations)
        gram = features.T @ features + np.eye(_FEATURES)
        self._root = np.linalg.inv(np.linalg.cholesky(gram)).T

    def __call__(self, observations: Array) -> Array:
        """`[..., O]` → `[...]`."""
        flat = observations.reshape(-1, observations.shape[-1])
        bonus = np.linalg.norm(self._features(flat) @ self._root, axis=1)
        return bonus.reshape(observations.shape[:-1]).astype(np.float32)

    def _features(self, observations: Array) -> NDArray[np.float64]:
        return np.cos(observations @ self._waves + self._phases) * np.sqrt(2 / _FEATURES)
