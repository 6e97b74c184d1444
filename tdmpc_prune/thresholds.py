"""The scores that count, of numbers that may be negative: as recovered, and as good enough."""

from __future__ import annotations


def back_at(before: float) -> float:
    """What counts as recovered from a cut: 95 % of the score before it."""
    return least(before, 0.05)


def least(reference: float, drop: float) -> float:
    """What is left of a score from which a fraction may be lost."""
    return reference - drop * abs(reference)
