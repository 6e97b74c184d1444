"""The groups of a computation as a value: what is in them, and what each of their units costs.

A unit is a class of tied indices: everything that has to go when one channel goes. A group is all
units that lie in the same places: one width. It is component-specific if its parameters lie in one
component, and coupling if they lie in several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from tdmpc_prune.pruning.ties import Fixed, Number


@dataclass(frozen=True)
class Slice:
    """What a group owns along one dimension of one parameter or buffer."""

    network: str
    tensor: str
    dim: int
    index: np.ndarray  # [n] positions along the dimension
    unit: np.ndarray  # [n] the group's unit that each belongs to


@dataclass(frozen=True)
class Group:
    """All units of one width. Units are numbered by their place in the layer that writes them."""

    name: str  # the layers that write it, joined by "+"
    components: tuple[str, ...]
    width: int
    slices: tuple[Slice, ...]
    layers: tuple[str, ...]  # of the counted network, that it touches

    @property
    def coupling(self) -> bool:
        return len(self.components) > 1

    @property
    def home(self) -> str:
        """The component that its units are listed under; `coupling` for those of several."""
        return "coupling" if self.coupling else self.components[0]

    @property
    def kind(self) -> str:
        return "coupling" if self.coupling else "specific"


# A size that depends on widths: what is fixed, and (group, channels per unit) for the rest.
Factor = tuple[int, tuple[tuple[str, int], ...]]


def size_of(factor: Factor, widths: Mapping[str, int]) -> int:
    """The size of a dimension at these widths."""
    fixed, parts = factor
    return fixed + sum(times * widths[group] for group, times in parts)


@dataclass(frozen=True)
class Size:
    """A product of sizes that depend on the widths: parameters, or multiply-accumulates."""

    component: str
    constant: int
    factors: tuple[Factor, ...]

    def at(self, widths: Mapping[str, int]) -> int:
        value = self.constant
        for factor in self.factors:
            value *= size_of(factor, widths)
        return value


@dataclass(frozen=True)
class Structure:
    """The groups of a computation, and how its size follows from their widths."""

    counted: str  # the network that is counted
    groups: tuple[Group, ...]
    parameter_sizes: tuple[Size, ...]
    mac_sizes: tuple[Size, ...]
    bare_norms: tuple[tuple[str, str, Factor], ...]  # (network, LayerNorm, its width), no weights
    fixed: tuple[Fixed, ...]  # widths that are no group, and why
    numbers: tuple[Number, ...]  # that enter the arithmetic, in order

    @property
    def widths(self) -> dict[str, int]:
        """Group → units."""
        return {group.name: group.width for group in self.groups}

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(size.component for size in self.parameter_sizes))

    def parameters(self, widths: Mapping[str, int] | None = None) -> dict[str, int]:
        """Component → parameters of the counted network, at these widths (the present ones)."""
        return _by_component(self.parameter_sizes, self.widths if widths is None else widths)

    def macs(self, widths: Mapping[str, int] | None = None) -> dict[str, int]:
        """Component → multiply-accumulates of the counted computation, at these widths."""
        return _by_component(self.mac_sizes, self.widths if widths is None else widths)

    def per_unit(self, group: str) -> tuple[int, int]:
        """Parameters and multiply-accumulates that go with one unit of `group`."""
        widths = self.widths
        less = widths | {group: widths[group] - 1}
        return (
            sum(self.parameters().values()) - sum(self.parameters(less).values()),
            sum(self.macs().values()) - sum(self.macs(less).values()),
        )

    def coupled_layers(self) -> tuple[str, ...]:
        """The layers that coupling groups touch."""
        return tuple(dict.fromkeys(x for g in self.groups if g.coupling for x in g.layers))

    def as_json(self) -> list[dict]:
        """The groups with their costs, as JSON types."""
        found = []
        for group in self.groups:
            parameters, macs = self.per_unit(group.name)
            found.append(
                {
                    "name": group.name,
                    "kind": group.kind,
                    "components": list(group.components),
                    "layers": list(group.layers),
                    "width": group.width,
                    "parameters_per_unit": parameters,
                    "planning_macs_per_unit": macs,
                }
            )
        return found

    def table(self) -> str:
        """The groups as Markdown: what they are, and what a unit of each costs."""
        fixed = "".join(f"\n- {text}" for text in self.why_fixed())
        if not self.groups:
            return f"There is nothing to cut: no width of this network can change.\n{fixed}"
        parameters, macs = sum(self.parameters().values()), sum(self.macs().values())
        coupled = set(self.coupled_layers())
        rows = []
        for group in self.groups:
            own, own_macs = self.per_unit(group.name)
            layers = ", ".join(f"{x}*" if x in coupled else x for x in group.layers)
            rows.append(
                [
                    group.name,
                    group.kind,
                    ", ".join(group.components),
                    group.width,
                    own,
                    f"{group.width * own / parameters:.1%}",
                    own_macs,
                    f"{group.width * own_macs / max(macs, 1):.1%}",
                    layers,
                ]
            )
        head = ["group", "kind", "components", "width", "parameters per unit", "share"]
        head += ["planning MACs per unit", "share", "layers (* coupled)"]
        right = ("left",) * 3 + ("right",) * 5 + ("left",)
        table = tabulate(rows, head, tablefmt="github", colalign=right)
        return (
            f"{table}\n\n{len(rows)} groups ({sum(g.coupling for g in self.groups)} coupling), "
            f"{parameters} parameters, {macs} planning MACs per decision. A weight belongs to "
            f"the unit that writes it and to the one that reads it: shares add up to over 100 %."
            + (f"\n\nWidths that stay as they are:\n{fixed}" if fixed else "")
        )

    def why_fixed(self) -> list[str]:
        """The widths that are no group, one line each, for people."""
        return [f"'{one.layer}' ({one.width} units): {one.why}" for one in self.fixed]


def _by_component(sizes: tuple[Size, ...], widths: Mapping[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for size in sizes:
        total[size.component] = total.get(size.component, 0) + size.at(widths)
    return total
