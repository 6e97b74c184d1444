"""Widths that can be cut, found by tracing: units, groups, and what each of them costs (ours).

A unit is a class of tied indices: everything that has to go when one channel goes. A group is all
units that lie in the same places: one width. It is component-specific if its parameters lie in one
component, and coupling if they lie in several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tabulate import tabulate
from torch import nn

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation
from tdmpc_prune.pruning.sizes import attribute_sizes
from tdmpc_prune.pruning.tracing import (
    OUTSIDE,
    Count,
    Fixed,
    Number,
    Trace,
    in_one_line,
    numbers_in,
    owners,
    trace,
    without_data,
)


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


def find_groups(computation: Computation) -> Structure:
    """Trace a computation and return its groups, in the order of its parameters.

    A width whose size enters the arithmetic (a division by `sqrt(x.shape[-1])`) is no group: a cut
    would change the function for what is left.

    Raises:
        UnknownOperation: see `trace`.
        UserError: see `trace`; or a width of a following network is tied to none of the counted.
    """
    seen = trace(computation)
    found = _structure(computation, seen)
    if _difference_when_wider(computation, found, list(found.widths)) == "":
        return found
    members = _group_classes(seen)[0]
    classes, fixed = seen.classes.copy(), seen.fixed
    for group, own in zip(found.groups, members, strict=True):
        if why := _difference_when_wider(computation, found, [group.name]):
            classes[np.isin(classes, own)] = classes[OUTSIDE]
            layers = group.name.partition("#")[0].split("+")
            fixed += tuple(Fixed(layer, group.width, why) for layer in layers)
    classes = np.unique(classes, return_inverse=True)[1]  # numbered without gaps
    return _structure(computation, replace(seen, classes=classes, fixed=fixed))


def _difference_when_wider(
    computation: Computation, structure: Structure, groups: list[str]
) -> str | None:
    """How the arithmetic changes if these groups are twice as wide: "" not at all, None if the
    computation does not run with other widths (a cut will be refused then)."""
    widths = structure.widths | {name: 2 * structure.widths[name] for name in groups}
    again = partial(numbers_at, computation, structure, widths)
    try:
        return difference(structure.numbers, again(), again)
    except UserError:
        return None


def numbers_at(
    computation: Computation, structure: Structure, widths: Mapping[str, int]
) -> tuple[Number, ...]:
    """What would enter the arithmetic at these widths.

    Raises:
        UserError: the computation does not run with them.
    """
    try:
        networks = _at_widths(computation, structure, widths)
    except (RuntimeError, ValueError) as error:  # a parametrisation that fits one shape only
        raise UserError(in_one_line(error)) from error
    return numbers_in(computation, networks)


def _at_widths(
    computation: Computation, structure: Structure, widths: Mapping[str, int]
) -> dict[str, nn.Module]:
    """Copies of the networks without data, as they would be at these widths."""
    originals = owners(computation.networks)
    shapes = {place: list(tensor.shape) for place, (_, tensor) in originals.items()}
    for group in structure.groups:
        for s in group.slices:
            per_unit = len(s.index) // group.width
            shapes[s.network, s.tensor][s.dim] += per_unit * (widths[group.name] - group.width)
    networks = without_data(computation.networks, shapes)
    for place, (module, _) in owners(networks).items():
        before = attribute_sizes(originals[place][0])
        for name, size in attribute_sizes(module).items():
            if size != before[name]:
                setattr(module, name, size)
    for network, path, width in structure.bare_norms:
        norm = networks[network].get_submodule(path)
        norm.normalized_shape = (*norm.normalized_shape[:-1], size_of(width, widths))
    return networks


def difference(
    before: tuple[Number, ...],
    after: tuple[Number, ...],
    again: Callable[[], tuple[Number, ...]],
) -> str:
    """The first number that is another one when widths change, for people; "" if there is none.

    Args:
        before: at one set of widths.
        after: at another.
        again: the latter once more: a number that is drawn anew every time says nothing.
    """
    repeated: tuple[Number, ...] = ()
    for number, (one, other) in enumerate(zip(before, after, strict=False)):
        if (one.place, one.operation) != (other.place, other.operation):
            return f"its size decides which operations run in {one.place}"
        if one == other:
            continue
        repeated = repeated or again()
        if repeated[number : number + 1] == (other,):
            pairs = zip(one.values, other.values, strict=False)
            differing = (pair for pair in pairs if pair[0] != pair[1])
            value, changed = next(differing, (len(one.values), len(other.values)))
            return (
                f"its size enters the arithmetic ({one.operation} in {one.place}: {value:g}, and "
                f"{changed:g} with another width); keep that number in an attribute"
            )
    if len(before) != len(after):
        return "its size decides which operations run"
    return ""


def _structure(computation: Computation, seen: Trace) -> Structure:
    """What was seen, as groups."""
    counted = next(iter(computation.networks))
    outside = seen.classes[OUTSIDE]
    members, group_of, unit_of = _group_classes(seen)

    # The slices of each group, axis by axis.
    slices: list[list[Slice]] = [[] for _ in members]
    written: list[list[str]] = [[] for _ in members]
    for axis in seen.axes:
        classes = seen.classes[axis.nodes]
        for number in np.unique(group_of[classes[classes != outside]]):
            index = np.flatnonzero((group_of[classes] == number) & (classes != outside))
            unit = unit_of[classes[index]]
            slices[number].append(Slice(axis.network, axis.tensor, axis.dim, index, unit))
            if axis.network == counted and int(axis.nodes[0]) in seen.written:
                written[number].append(_layer(axis.tensor))

    components = {
        name: module.component
        for name, module in computation.networks[counted].named_modules()
        if hasattr(module, "component")
    }
    groups = []
    for number, own in enumerate(slices):
        counted_slices = [s for s in own if s.network == counted]
        if not counted_slices:
            s = own[0]
            raise UserError(
                f"'{s.tensor}' of network '{s.network}' is tied to nothing in '{counted}': the "
                f"traced computation lacks what keeps them alike (the target's moving average)"
            )
        layers = tuple(dict.fromkeys(_layer(s.tensor) for s in counted_slices))
        groups.append(
            Group(
                name="+".join(dict.fromkeys(written[number])) or layers[0],
                components=tuple(dict.fromkeys(components[layer] for layer in layers)),
                width=len(members[number]),
                slices=tuple(own),
                layers=layers,
            )
        )
    groups = _distinct_names(groups)

    def factor(nodes: np.ndarray) -> Factor:
        own = seen.classes[nodes]
        inside = own[own != outside]
        numbers, occurrences = np.unique(group_of[inside], return_counts=True)
        parts = tuple(
            (groups[number].name, int(times) // groups[number].width)
            for number, times in zip(numbers, occurrences, strict=True)
        )
        return len(own) - len(inside), parts

    def sizes(counts: tuple[Count, ...]) -> tuple[Size, ...]:
        return tuple(
            Size(count.component, count.constant, tuple(map(factor, count.factors)))
            for count in counts
        )

    return Structure(
        counted=counted,
        groups=tuple(groups),
        parameter_sizes=sizes(seen.parameters),
        mac_sizes=sizes(seen.macs),
        bare_norms=tuple(
            (network, module, factor(nodes)) for network, module, nodes in seen.bare_norms
        ),
        fixed=seen.fixed,
        numbers=seen.numbers,
    )


def _group_classes(seen: Trace) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Group the classes of tied nodes by the places where they occur, and how often.

    Returns:
        The classes of each group in the order of their units; and for each class its group and its
        unit (meaningless for the outside).
    """
    places = [axis.nodes for axis in seen.axes]
    places += [nodes for count in seen.macs for nodes in count.factors]
    class_count = seen.classes.max() + 1
    occurrences = np.zeros((class_count, len(places)), np.int32)
    first = np.full(class_count, np.iinfo(np.int64).max)
    for number, nodes in enumerate(places):
        np.add.at(occurrences[:, number], seen.classes[nodes], 1)
    np.minimum.at(first, seen.classes, np.arange(len(seen.classes)))
    inside = np.flatnonzero(np.arange(class_count) != seen.classes[OUTSIDE])
    inside = inside[np.argsort(first[inside])]

    group_of = np.zeros(class_count, int)
    unit_of = np.zeros(class_count, int)
    members: dict[bytes, list[int]] = {}
    for number in inside:
        members.setdefault(occurrences[number].tobytes(), []).append(number)
    for group, classes in enumerate(members.values()):
        group_of[classes] = group
        unit_of[classes] = np.arange(len(classes))
    return [np.array(classes) for classes in members.values()], group_of, unit_of


def _layer(tensor: str) -> str:
    """The module that a parameter lies in."""
    return tensor.rpartition(".")[0]


def _distinct_names(groups: list[Group]) -> list[Group]:
    """Groups that the same layer writes (parts of its width) are numbered."""
    count: dict[str, int] = {}
    for group in groups:
        count[group.name] = count.get(group.name, 0) + 1
    seen: dict[str, int] = {}
    found = []
    for group in groups:
        if count[group.name] > 1:
            seen[group.name] = seen.get(group.name, 0) + 1
            group = replace(group, name=f"{group.name}#{seen[group.name]}")
        found.append(group)
    return found
