"""Everything about pruning that can be set: what ranks, how much goes from where, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tdmpc_prune.settings import Choice, Idle, among, require, setting

GRADIENT_METRICS = ("bayesian", "fisher", "fisher_increase", "gradient", "taylor")

METRICS = (*GRADIENT_METRICS, "magnitude", "random")

L2 = "magnitude_l2"  # what magnitude was before: not tracked unless it is asked for

BY_DATA = ("compensated", "reconstruction")  # what units add to what the others say

ALL_METHODS = ("none", *METRICS, L2, *BY_DATA)

SHAPES = ("cosine", "linear", "cubic")

ALLOCATIONS = ("global", "balanced", "uniform")

_OF_PLANS = (  # what a plan on file has decided
    *("sparsity", "start", "end", "steps", "shape", "allocation"),
    *("min_width", "min_widths", "round_to", "budgets", "protect"),
)


@dataclass(frozen=True)
class PruneConfig:
    """How networks are compressed while they learn."""

    method: str = setting("none", f"what ranks the units: {', '.join(ALL_METHODS)}")
    sparsity: float = setting(0.9, "fraction of the parameters removed in the end")
    start: float = setting(
        0.2,
        "start of the schedule: up to 1 a fraction of the run, above 1 env steps into it",
    )
    end: float = setting(0.6, "time of the last cut, likewise")
    steps: int = setting(4, "cuts, evenly spaced after start up to end")
    shape: str = setting("cosine", f"how sparsity grows between them: {', '.join(SHAPES)}")
    allocation: str = setting(
        "global",
        "global ranks units of all groups by importance per parameter; balanced also by what is "
        "left of their group; uniform cuts alike",
    )
    refit: bool = setting(
        True, "after a cut, fit the layers that are left to what the whole networks computed"
    )
    rotate: bool = setting(
        True,
        "compensated, reconstruction: cut widths that are written and read linearly in the basis "
        "in which few units carry them",
    )
    distil: int = setting(
        0,
        "an agent's offline training steps after a refit, at most, to follow what it was before; "
        "in rounds, as long as its return is below 95 % of that; each is kept only if it raises it",
    )
    min_width: int = setting(16, "units that every group keeps at least")
    min_widths: dict[str, int] = setting(
        dict, "the same for a group, a component or `coupling`: {coupling: 16}"
    )
    round_to: int = setting(8, "widths that are cut become a multiple of this")
    budgets: dict[str, float] = setting(
        dict, "largest fraction of a component's parameters that may go: {dynamics: 0.5}"
    )
    protect: list[str] = setting(list, "groups, components or `coupling` that are not cut")
    max_return_drop: float = setting(
        0.1,
        "a step is undone if its return stays lower than this fraction below the best so far; than "
        "twice that, and for longer, if it was not so low right after the cut",
    )
    eval_episodes: int = setting(
        5, "episodes of each measurement around a cut; at most as many as an evaluation has"
    )
    smoothing: float = setting(0.99, "decay per update of the current evidence")
    memory: float = setting(0.999, "decay per update of the historical evidence")
    confidence: float = setting(
        1.0, "bayesian: posterior standard deviations added to the mean (kappa)"
    )
    compare: bool = setting(True, "track every metric, and log how alike they rank the units")
    gather_updates: int = setting(
        300, "of a finished agent: batches whose gradients are gathered before anything is cut"
    )
    gather_episodes: int = setting(
        10, "episodes played for that first if the agent comes without a replay buffer"
    )
    plan: str | None = setting(
        None, "a saved plan to carry out, as the only cut, when the run starts"
    )

    def __post_init__(self):
        choices = (("method", ALL_METHODS), ("shape", SHAPES), ("allocation", ALLOCATIONS))
        for name, known in choices:
            value = getattr(self, name)
            require(value in known, f"prune.{name}={value} must be one of {', '.join(known)}")
        require(0 < self.sparsity < 1, f"prune.sparsity={self.sparsity} must lie in (0, 1)")
        require(self.start >= 0, f"prune.start={self.start} cannot be negative")
        counts = ("steps", "min_width", "round_to", "eval_episodes", "gather_updates")
        for name in (*counts, "gather_episodes"):
            value = getattr(self, name)
            require(value >= 1, f"prune.{name}={value} must be at least 1")
        for name in ("smoothing", "memory"):
            value = getattr(self, name)
            require(0 <= value < 1, f"prune.{name}={value} must lie in [0, 1)")
        for name in ("max_return_drop", "confidence", "distil"):
            value = getattr(self, name)
            require(value >= 0, f"prune.{name}={value} cannot be negative")
        require(
            not self.budgets or self.allocation != "uniform",
            "prune.budgets needs prune.allocation=global or balanced: uniform cuts all alike",
        )
        require(
            not self.budgets or not self.by_data,
            f"prune.budgets cannot be kept with prune={self.method}; use prune.min_widths",
        )
        for component, value in self.budgets.items():
            require(0 <= value <= 1, f"prune.budgets: {component}={value} must lie in [0, 1]")
        for name, value in self.min_widths.items():
            require(value >= 1, f"prune.min_widths: {name}={value} must be at least 1")

    def idle(self, given: Sequence[str]) -> Idle | None:
        """One of the given settings, by its name on the command line, that has no effect."""
        if self.plan:
            names = (n for field in _OF_PLANS for n in (f"prune.{field}", f"prune.{field}."))
            if name := among(given, *names):
                return Idle(name, "with prune.plan=…, which is carried out as it is")
        if "prune.allocation" in given and self.by_data:
            return Idle("prune.allocation", f"with prune={self.method}, whose gains are compared")
        if "prune.rotate" in given and not self.by_data:
            return Idle(
                "prune.rotate", f"with prune={self.method}, which keeps the networks' basis"
            )
        if "prune.distil" in given and self.distil and not self.refit:
            return Idle("prune.distil", "with prune.refit=false")
        if "prune.shape" in given and self.steps == 1:
            return Idle("prune.shape", "with prune.steps=1")
        gathered = ("prune.smoothing", "prune.memory", "prune.confidence")
        if not self.compare and self.method not in GRADIENT_METRICS:
            if name := among(given, *gathered):
                return Idle(name, f"with prune={self.method} and prune.compare=false")
        elif not self.compare and self.method != "bayesian" and gathered[2] in given:
            return Idle(gathered[2], f"with prune={self.method} and prune.compare=false")
        return None

    def clipped(self, given: Sequence[str], eval_episodes: int) -> Idle | None:
        """Episodes around a cut, if given, that are more than an evaluation has."""
        if "prune.eval_episodes" in given and self.eval_episodes > eval_episodes:
            return Idle(
                "prune.eval_episodes",
                f"above eval_episodes={eval_episodes}",
                f"eval_episodes={self.eval_episodes}",
            )
        return None

    @property
    def by_data(self) -> bool:
        """Whether units are ranked at the cut, by data, and not by gradients on the way there."""
        return self.method in BY_DATA

    @property
    def tracked(self) -> tuple[str, ...]:
        """The metrics that are computed on the way."""
        if self.compare:
            return (*METRICS, L2) if self.method == L2 else METRICS
        return () if self.by_data else (self.method,)


_MEANINGS = {
    "bayesian": "upper credible bound of the energy of gradient × weight",
    "fisher": "squared gradients",
    "fisher_increase": "squared gradient × weight: what a removal would change",
    "gradient": "absolute gradients",
    "taylor": "absolute gradient × weight",
    "magnitude": "root mean square of the weights",
    L2: "norm of the weights per parameter, by which units of many weights look cheap",
    "random": "chance, to compare with",
}

_BY_DATA = {
    "compensated": "what the others cannot say for it, weighed by what the networks are used for",
    "reconstruction": "the same, all outputs alike",
}

# Where gradients on the way tell, where a cut may also be chosen by data, and where networks may
# stay dense.
TRACKED = {name: Choice(PruneConfig(name), text) for name, text in _MEANINGS.items()}
_RANKINGS = {
    name: Choice(PruneConfig(name, min_width=2, round_to=1), text)
    for name, text in _BY_DATA.items()
} | TRACKED
METHODS = {"none": Choice(PruneConfig(), "nothing is cut, the networks stay dense"), **_RANKINGS}
RANKINGS = {**_RANKINGS, "none": Choice(PruneConfig(), None)}

# One cut of what has been learnt, mended offline where that is needed.
ONE_CUT = replace(RANKINGS["compensated"].value, start=0.0, steps=1, distil=8_000, eval_episodes=10)
