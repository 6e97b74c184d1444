"""When cuts happen, and how sparse the networks are after each.

The cosine follows METHOD IMPORTANCE (Sundaram et al. 2026: cosine scheduling); the number of steps,
their even spacing and what follows an undone step are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.config import PruneConfig


@dataclass(frozen=True)
class Schedule:
    """`steps` cuts, evenly spaced in (start, end], in the unit of the run's length."""

    start: float
    end: float
    steps: int
    sparsity: float  # after the last
    shape: str

    def progress(self, now: float) -> float:
        """The part of the schedule that lies behind, in [0, 1]."""
        if self.end <= self.start:
            return float(now >= self.end)
        return min(1.0, max(0.0, (now - self.start) / (self.end - self.start)))

    def time_of(self, step: int) -> float:
        """The time at which cut `step` (1 to `steps`) is due."""
        return self.start + (self.end - self.start) * step / self.steps

    def sparsity_after(self, step: int) -> float:
        """The fraction of parameters that is to be gone after cut `step`."""
        return self.sparsity * shape_at(self.shape, min(1.0, step / self.steps))

    @property
    def spacing(self) -> float:
        """The time between two cuts; 0 if all are due at once."""
        return (self.end - self.start) / self.steps

    def end_of(self, step: int, cut_at: float, last: float) -> float:
        """The time at which the recovery from cut `step` ends: when the next is due.

        A cut that came late, or after the schedule, still gets the time between two cuts; if that
        is none, it has until the end of the run, `last`.
        """
        if not self.spacing:
            return last
        due = self.time_of(step) + self.spacing if step <= self.steps else 0
        return min(due if due > cut_at else cut_at + self.spacing, last)


def shape_at(shape: str, progress: float) -> float:
    """The part of the final sparsity at `progress` in [0, 1]; 0 at 0, and 1 at 1."""
    if shape == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    if shape == "cubic":
        return 1 - (1 - progress) ** 3
    return progress


def make_schedule(config: PruneConfig, first: int, last: int, unit: str) -> Schedule:
    """The schedule of a run that goes from time `first` to time `last`.

    `unit` is the setting that gives its length: env_steps, or updates.

    Raises:
        UserError: it would end after the run, or before it starts.
    """

    def time(value: float) -> float:
        return first + (value * (last - first) if value <= 1 else value)

    start, end = time(config.start), time(config.end)
    shown = unit.replace("_", " ")
    if end > last:
        raise UserError(
            f"the pruning schedule ends at {end:.0f} {shown}, after the run, which ends at "
            f"{last}: lower prune.end={config.end:g}, or raise {unit}"
        )
    if end < start:
        raise UserError(f"prune.end={config.end:g} lies before prune.start={config.start:g}")
    return Schedule(start, end, config.steps, config.sparsity, config.shape)
