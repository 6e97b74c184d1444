"""What a pruner knows of its run, and where the run stands in its pruning (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunFacts:
    """What a pruner has to know of the run that it prunes."""

    dense: Mapping[str, int]  # component → parameters before anything was cut
    first: int  # time at which the run starts
    last: int  # and ends
    unit: str  # of time, as the setting of the run's length is called: "env_steps", "updates"
    score: str  # what is measured: "return", "PSNR"
    seed: int  # of the `random` baseline
    gather: bool  # gradients have to be gathered first: nothing is learnt before the first cut


@dataclass
class Stage:
    """Where a run stands in its pruning; JSON types."""

    # gathering, then waiting → measured → cut (→ mending → mended) → recovering → waiting | failed
    phase: str = "gathering"
    gathered: int = 0  # updates whose gradients were gathered before the start
    step: int = 0  # steps taken; those beyond the schedule's are smaller cuts for undone ones
    kept: int = 0  # cuts that were not undone
    changes: int = 0  # cuts and undone cuts: two equal numbers, and these are the same networks
    reference: float | None = None  # best score so far
    dense_score: float | None = None  # of the dense networks when they were to be cut first
    dense_scores: list[list[float]] = field(default_factory=list)  # until then: [time, score]
    failed: float | None = None  # smallest sparsity that had to be undone
    undone: list[dict[str, float]] = field(default_factory=list)  # step, sparsity, score, least
    exhausted: bool = False  # nothing smaller than what was undone can be cut
    offline_steps: int = 0  # of mending, that went into the present networks
    came_back: bool = False  # a score of the training has been as good as before the cut
    record: dict[str, Any] = field(default_factory=dict)  # of the step in progress
