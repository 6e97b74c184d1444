"""Choose the units to cut, by their importance per parameter and within limits (ours).

Widths shrink in chunks, so that what is left of a width is a multiple of `round_to`. `global`
allocation takes, again and again, the chunk with the least importance per parameter, wherever it
lies; `balanced` does too, but the importance of a chunk grows as its group shrinks: it is divided
by the share of the group's importance that would be left, so that a group's last units go later
than their small importance in the whole network would have them go. `uniform` takes the same
fraction of every group. All stop at the asked sparsity.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import numpy as np

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.plan import Plan, plan_of
from tdmpc_prune.pruning.structure import Group, Structure


def make_plan(
    structure: Structure,
    densities: np.ndarray,
    config: PruneConfig,
    sparsity: float,
    dense: Mapping[str, int],
    strict: bool = True,
) -> Plan:
    """Choose the units to cut.

    Args:
        structure: the present groups.
        densities: `[U]` importance per parameter of each unit, all groups in their order.
        config: allocation, floors, budgets, protection.
        sparsity: fraction of the dense parameters that is to be gone.
        dense: component → parameters of the dense network.
        strict: False cuts as far as the limits allow.

    Raises:
        UserError: floors, budgets and protection do not allow it, and which bind; or there is no
            group at all.
    """
    if not np.isfinite(densities).all():
        raise ValueError("a unit's importance is not a finite number")
    widths = structure.widths
    if not widths:
        why = "; ".join(structure.why_fixed())
        raise UserError(f"there is nothing to cut: no width can change{why and f' ({why})'}")
    floors = width_floors(structure, config)
    cuts = np.cumsum(list(widths.values()))[:-1]
    ranked = {  # least important first; equal ones in their order
        name: (np.argsort(part, kind="stable"), np.sort(part))
        for name, part in zip(widths, np.split(densities, cuts), strict=True)
    }
    allowed = (1 - sparsity) * sum(dense.values())
    allocate = _allocate_uniformly if config.allocation == "uniform" else _allocate_by_cost
    after = allocate(structure, ranked, floors, config, allowed, dense)
    left = sum(structure.parameters(after).values())
    if strict and left > allowed:
        if config.protect and after == widths:
            raise UserError(
                f"prune.protect={config.protect} (with the floors) leaves nothing that may be cut"
            )
        raise UserError(_unreachable(structure, floors, config, sparsity, left, allowed))
    order = {name: units for name, (units, _) in ranked.items()}
    return plan_of(structure, order, after, (config.method, config.allocation), sparsity, dense)


def width_floors(structure: Structure, config: PruneConfig) -> dict[str, int]:
    """The fewest units that each group keeps, its present width where it is protected.

    Raises:
        UserError: a name is unknown.
    """
    for setting, names in (
        ("protect", config.protect),
        ("min_widths", config.min_widths),
        ("budgets", config.budgets),
    ):
        for name in names:
            known = [c for c in structure.components if _is_part(c, name)]
            if setting != "budgets" and not known:
                known = [g for g in structure.groups if _selects(name, g)]
            if not known:
                groups = (
                    "" if setting == "budgets" else f", coupling, {', '.join(structure.widths)}"
                )
                raise UserError(
                    f"prune.{setting}: there is no '{name}'; there are "
                    f"{', '.join(structure.components)}{groups}"
                )
    floors = {}
    for group in structure.groups:
        least = config.min_width
        for name, width in config.min_widths.items():
            if _selects(name, group):
                least = max(least, width)
        least = -(-least // config.round_to) * config.round_to  # up to a multiple
        protected = any(
            _selects(name, group) or any(_is_part(c, name) for c in group.components)
            for name in config.protect
        )
        floors[group.name] = group.width if protected else min(least, group.width)
    return floors


def _selects(name: str, group: Group) -> bool:
    """Whether a name of the configuration means this group: itself, its kind, its component."""
    if name == group.name or (name == "coupling" and group.coupling):
        return True
    return not group.coupling and _is_part(group.components[0], name)


def _is_part(component: str, name: str) -> bool:
    """`q_ensemble` means every `q_ensemble.<member>`."""
    return component == name or component.startswith(f"{name}.")


def _narrower(width: int, floor: int, round_to: int) -> int:
    """The next smaller width that is allowed; the same if there is none."""
    smaller = (width - 1) // round_to * round_to
    return smaller if smaller >= floor and smaller > 0 else width


def _chunk_cost(densities: np.ndarray, gone: int, size: int, balanced: bool) -> float:
    """What the next chunk of a group costs, per parameter.

    Its mean density; `balanced` divides that by the share of the group's importance that is left
    after it. (LAMP, Lee et al. 2021, divides squared weights by what is left, themselves included,
    and does not keep the group's total.) With i for the importance cut
    and r for the share left, Σ i / r is about −log r times the group's importance: emptying a group
    costs infinitely much (ours).

    Args:
        densities: `[n]` of the group's units, ascending.
        gone: units that are cut already.
        size: units of the chunk.
        balanced: or plain.
    """
    mean = densities[gone : gone + size].mean()
    if not balanced or mean == 0:
        return float(mean)
    left = densities[gone + size :].sum() / densities.sum()
    return float(mean / left) if left > 0 else math.inf


def _allocate_by_cost(structure, ranked, floors, config, allowed, dense) -> dict[str, int]:
    """Cut the chunk that costs least, again and again."""
    widths = dict(structure.widths)
    left = structure.parameters(widths)
    limits = {
        name: (1 - fraction) * sum(n for c, n in dense.items() if _is_part(c, name))
        for name, fraction in config.budgets.items()
    }
    sizes_of = {name: [] for name in widths}
    for size in structure.parameter_sizes:
        for name in {name for _, parts in size.factors for name, _ in parts}:
            sizes_of[name].append(size)
    heap: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        """Put a group's next chunk on the heap."""
        width = widths[name]
        narrower = _narrower(width, floors[name], config.round_to)
        if narrower < width:
            gone = structure.widths[name] - width
            cost = _chunk_cost(
                ranked[name][1], gone, width - narrower, config.allocation == "balanced"
            )
            heapq.heappush(heap, (cost, name, narrower))

    for name in widths:
        offer(name)
    while heap and sum(left.values()) > allowed:
        _, name, narrower = heapq.heappop(heap)
        fewer = dict(left)
        for size in sizes_of[name]:
            change = size.at(widths | {name: narrower}) - size.at(widths)
            fewer[size.component] += change
        within = all(
            sum(n for c, n in fewer.items() if _is_part(c, budget)) >= limit
            or all(fewer[c] == left[c] for c in fewer if _is_part(c, budget))
            for budget, limit in limits.items()
        )
        if within:  # else a budget is used up, and this group is done
            widths[name], left = narrower, fewer
            offer(name)
    return widths


def _allocate_uniformly(structure, ranked, floors, config, allowed, dense) -> dict[str, int]:
    """The same fraction of every group: the smallest that is enough."""

    def cut(fraction: float) -> dict[str, int]:
        after = {}
        for name, width in structure.widths.items():
            while width > (1 - fraction) * structure.widths[name]:
                narrower = _narrower(width, floors[name], config.round_to)
                if narrower == width or narrower < (1 - fraction) * structure.widths[name] - 1e-9:
                    break
                width = narrower
            after[name] = width
        return after

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(structure.parameters(cut(middle)).values()) > allowed:
            low = middle
        else:
            high = middle
    return cut(high)


def _unreachable(structure, floors, config, sparsity, left, allowed) -> str:
    """Which limits keep a sparsity from being reached."""
    at_floor = {name: floors[name] for name in structure.widths}
    gains = {}
    for group in structure.groups:
        fewer = at_floor | {group.name: 1}
        gain = sum(structure.parameters(at_floor).values()) - sum(
            structure.parameters(fewer).values()
        )
        if gain > 0:
            gains[group.name] = gain
    worst = sorted(gains, key=gains.get, reverse=True)
    binding = ", ".join(f"{name} ≥ {floors[name]}" for name in worst)
    budgets = f"; budgets {dict(config.budgets)}" if config.budgets else ""
    return (
        f"sparsity {sparsity:g} cannot be reached: {left} parameters are left with everything cut "
        f"that may be, {int(allowed)} would have to be; binding floors: {binding}{budgets}; lower "
        f"prune.sparsity, prune.min_width, prune.min_widths, prune.round_to or prune.protect"
    )
