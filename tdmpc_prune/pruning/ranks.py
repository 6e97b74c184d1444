"""Ranks, and how alike two orders are: as SciPy has them, which is slow to import for these."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """`[N]` → `[N]` from 1, the least; equal values share their mean rank, NaN has none (NaN)."""
    found, known = np.full(len(values), np.nan), ~np.isnan(values)
    _, place, counts = np.unique(values[known], return_inverse=True, return_counts=True)
    found[known] = (counts.cumsum() - (counts - 1) / 2)[place]
    return found


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of `[N]` and `[N]`; NaN if either is constant."""
    return correlation(ranks(one), ranks(other))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation of `[N]` and `[N]`; NaN if either is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return np.nan
    return float(np.corrcoef(one, other)[0, 1])
