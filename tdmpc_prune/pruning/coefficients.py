"""How much to take from each group, found by grid search or by gradient descent.

IMPORTANCE (Sundaram et al. 2026) finds pruning coefficients by grid search and by gradient-based
optimisation; no formula is published. The soft mask, the constraint and the repair here are ours.

A coefficient c is the fraction of a group's units that goes, least important first. A unit whose
rank among them is r in (0, 1) has the soft mask sigmoid((r - c) / tau); `soft_masks` says what that
does to a network. As tau goes to 0 it becomes the one that is cut. The fraction of parameters that
is gone follows from the sums of the masks, so both it and the loss can be differentiated.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.allocation import width_floors
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.plan import Plan, plan_of
from tdmpc_prune.pruning.soft_masks import Objective, masked
from tdmpc_prune.pruning.structure import Structure

Metric = Callable[[Plan], float]  # a plan → the task metric of the network cut by it; higher wins

_RATE = 0.2  # of Adam, on the coefficients, over the root of the number of steps
_FIRST_TAU, _LAST_TAU = 0.1, 0.01
_SLACK = 3.0  # times tau that a coefficient may lie beyond its range meanwhile
_PENALTY = 100.0  # of the squared violation of the constraint
_FIRST_GRID = (0.0, 0.5, 1.0)  # shares of each component's largest coefficient
_REFINEMENTS = (0.25, 0.125)  # steps of the finer grids around the best
_COARSE, _MIDDLE = 0.5, 0.75  # of the budget: the end of the first grid, and of the second


class Ranking:
    """The units of every group from least to most important, and what may be taken."""

    def __init__(
        self,
        structure: Structure,
        densities: np.ndarray,
        config: PruneConfig,
        dense: Mapping[str, int],
        largest: float = 1.0,
    ):
        """Rank the units.

        Args:
            structure: the groups.
            densities: `[U]` importance per parameter of each unit, all groups in their order.
            config: floors and protection; widths are not rounded.
            dense: component → parameters of the dense network.
            largest: coefficient that a group may have.
        """
        self.structure = structure
        self.dense = dense
        self.floors = {
            name: max(floor, math.ceil((1 - largest) * structure.widths[name] - 1e-9))
            for name, floor in width_floors(structure, replace(config, round_to=1)).items()
        }
        cuts = np.cumsum(list(structure.widths.values()))[:-1]
        parts = np.split(densities, cuts)
        names = list(structure.widths)
        self.order = {n: np.argsort(p, kind="stable") for n, p in zip(names, parts, strict=True)}
        self.rank = {}  # group → rank of each unit in (0, 1)
        for name, order in self.order.items():
            rank = np.empty(len(order))
            rank[order] = (np.arange(len(order)) + 0.5) / len(order)
            self.rank[name] = torch.from_numpy(rank).float()
        self.largest = {
            name: 1 - self.floors[name] / width for name, width in structure.widths.items()
        }

    def masks(self, coefficients: Mapping[str, Tensor], tau: float) -> dict[str, Tensor]:
        """Group → soft mask of its units `[width]`: 1 stays, 0 is gone."""
        return {
            name: torch.sigmoid((rank - coefficients[name]) / tau)
            for name, rank in self.rank.items()
        }

    def sparsity(self, widths: Mapping[str, Tensor | int]) -> Tensor | float:
        """Fraction of the dense parameters that is gone at these widths, soft ones or whole."""
        left = sum(size.at(widths) for size in self.structure.parameter_sizes)
        return 1 - left / sum(self.dense.values())

    def plan(
        self, coefficients: Mapping[str, float], sparsity: float, tolerance: float, method: str
    ) -> Plan:
        """The plan closest to these coefficients whose sparsity is within the tolerance.

        All coefficients are moved by the same share of what is left of them, or of their room,
        until just enough is gone; single units then make up for the rounding.

        Raises:
            UserError: it cannot be reached.
        """
        widths, largest = self.structure.widths, self.largest

        def moved(by: float) -> dict[str, int]:
            after = {}
            for name, width in widths.items():
                c = min(max(float(coefficients[name]), 0.0), largest[name])
                c = c + by * (largest[name] - c) if by > 0 else c * (1 + by)
                after[name] = max(self.floors[name], width - math.floor(c * width + 0.5))
            return after

        if self.sparsity(self.floors) < sparsity:
            raise UserError(
                f"sparsity {sparsity:g} cannot be reached: with every width at its floor it is "
                f"{self.sparsity(self.floors):.3f}; lower it, prune.min_width or prune.protect"
            )
        low, high = -1.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (
                (low, middle) if self.sparsity(moved(middle)) >= sparsity else (middle, high)
            )
        after = self._give_back(moved(high), sparsity)
        if self.sparsity(after) > sparsity + tolerance:
            raise UserError(
                f"sparsity {sparsity:g} cannot be met within {tolerance:g}: a single unit more or "
                f"less makes {self.sparsity(after):.4f}; allow more tolerance"
            )
        return plan_of(
            self.structure, self.order, after, (method, "coefficients"), sparsity, self.dense
        )

    def _give_back(self, after: dict[str, int], sparsity: float) -> dict[str, int]:
        """Give units back as long as enough is gone: the largest that still fits, first."""
        while True:
            options = [
                after | {name: after[name] + 1}
                for name, width in self.structure.widths.items()
                if after[name] < width
            ]
            options = [widths for widths in options if self.sparsity(widths) >= sparsity]
            if not options:
                return after
            after = min(options, key=self.sparsity)


# --- The two searches -------------------------------------------------------------------------


def by_gradient(
    ranking: Ranking,
    networks: Mapping[str, nn.Module],
    objective: Objective,
    sparsity: float,
    steps: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, float]:
    """Coefficients by gradient descent on the loss of the soft-masked networks.

    The logarithm of the loss is minimised, so that its scale does not matter, under an augmented
    Lagrangian for the sparsity; tau falls from step to step.

    Args:
        ranking: of the units.
        networks: that the structure was found in.
        objective: the loss of a new batch at each call.
        sparsity: to be reached.
        steps: of the descent, at least 2; each evaluates the objective once.
        progress: told steps done, and of how many.

    Returns:
        Group → coefficient.
    """
    names = [name for name, most in ranking.largest.items() if most > 0]
    most = torch.tensor([ranking.largest[name] for name in names])
    values = torch.minimum(torch.full_like(most, _uniform(ranking, sparsity)), most)
    values.requires_grad_()
    optimiser = torch.optim.Adam([values], lr=_RATE / math.sqrt(steps))
    multiplier = 0.0
    # A protected group keeps even its least important unit while tau is large.
    kept = {name: torch.tensor(-math.inf) for name in ranking.largest if name not in names}
    trained = [p for module in networks.values() for p in module.parameters() if p.requires_grad]
    with _frozen(trained):
        for step in range(steps):
            tau = _FIRST_TAU * (_LAST_TAU / _FIRST_TAU) ** (step / (steps - 1))
            masks = ranking.masks(kept | dict(zip(names, values, strict=True)), tau)
            loss = masked(objective, networks, ranking.structure, masks)
            gone = ranking.sparsity({name: mask.sum() for name, mask in masks.items()})
            short = sparsity - gone
            total = torch.log(loss) + multiplier * short + _PENALTY / 2 * short.square()
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            with torch.no_grad():  # where all masks of a group are 0 or 1, nothing pulls it back
                values.copy_(values.clamp(min=-_SLACK * tau).minimum(most + _SLACK * tau))
            multiplier += _PENALTY / 10 * short.item()
            progress(step + 1, steps)
    found = values.detach().clamp(min=0.0).minimum(most).tolist()
    return dict.fromkeys(ranking.largest, 0.0) | dict(zip(names, found, strict=True))


@contextlib.contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Spare the gradients that are not needed."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def by_grid(
    ranking: Ranking,
    metric: Metric,
    sparsity: float,
    tolerance: float,
    budget: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[dict[str, float], int]:
    """Coefficients by grid search with the real metric, groups tied by component, coarse to fine.

    Args:
        ranking: of the units.
        metric: of the network that a plan cuts.
        sparsity: to be reached; every point is moved until it is.
        tolerance: by which it may be exceeded.
        budget: most evaluations of the metric.
        progress: told evaluations done, and of how many at most.

    Returns:
        Group → coefficient, and how often the metric was evaluated.
    """
    homes = {group.name: group.home for group in ranking.structure.groups}
    components = list(dict.fromkeys(homes.values()))
    seen: dict[str, float] = {}
    best: tuple[float, tuple[float, ...]] | None = None

    def try_point(point: tuple[float, ...], limit: int) -> None:
        nonlocal best
        if len(seen) >= limit:
            return
        share = dict(zip(components, point, strict=True))
        wanted = {name: share[home] * ranking.largest[name] for name, home in homes.items()}
        plan = ranking.plan(wanted, sparsity, tolerance, "grid")
        key = str(sorted(plan.widths_after.items()))
        if key in seen:
            return
        seen[key] = metric(plan)
        progress(len(seen), budget)
        if best is None or seen[key] > best[0]:
            best = (seen[key], point)

    coarse = itertools.product(_FIRST_GRID, repeat=len(components))
    middle = (0.5,) * len(components)
    for point in sorted(
        coarse, key=lambda p: sum(abs(a - b) for a, b in zip(p, middle, strict=True))
    ):
        try_point(point, math.ceil(_COARSE * budget))
    for step in _REFINEMENTS:
        _, centre = best
        changes = itertools.product((-step, 0.0, step), repeat=len(components))
        # One component at a time first: with many of them the budget ends before the product does.
        for change in sorted(changes, key=np.count_nonzero):
            point = tuple(min(1.0, max(0.0, c + d)) for c, d in zip(centre, change, strict=True))
            try_point(point, budget if step == _REFINEMENTS[-1] else math.ceil(_MIDDLE * budget))
    share = dict(zip(components, best[1], strict=True))
    return {name: share[home] * ranking.largest[name] for name, home in homes.items()}, len(seen)


def _uniform(ranking: Ranking, sparsity: float) -> float:
    """The one coefficient of all groups that reaches the sparsity."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        widths = {
            name: width * (1 - min(middle, ranking.largest[name]))
            for name, width in ranking.structure.widths.items()
        }
        low, high = (low, middle) if ranking.sparsity(widths) >= sparsity else (middle, high)
    return high
