"""Find the widths that can be cut, by tracing (ours). What was seen, as groups of units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation
from tdmpc_prune.pruning.numbers import difference_when_wider
from tdmpc_prune.pruning.structure import Factor, Group, Size, Slice, Structure
from tdmpc_prune.pruning.ties import OUTSIDE, Count, Fixed, Trace
from tdmpc_prune.pruning.tracing import trace


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
    if difference_when_wider(computation, found, list(found.widths)) == "":
        return found
    members = _group_classes(seen)[0]
    held, fixed = [], []
    for group, own in zip(found.groups, members, strict=True):
        if why := difference_when_wider(computation, found, [group.name]):
            held += own.tolist()
            layers = group.name.partition("#")[0].split("+")
            fixed += [Fixed(layer, group.width, why) for layer in layers]
    return _structure(computation, _hold(seen, np.array(held, int), fixed))


def groups_left(
    computation: Computation,
    before: Structure,
    dropped: Mapping[tuple[str, str], Mapping[int, np.ndarray]],
) -> Structure:
    """Trace a computation that was cut and return its groups.

    As `find_groups`, but widths that could not be cut before cannot be now, without another run
    that shows it.

    Args:
        computation: as it is now.
        before: its groups before the cut.
        dropped: (network, tensor) → dimension → indices that are gone.

    Raises:
        UserError: see `find_groups`.
    """
    seen = trace(computation)
    free: dict[tuple[str, str, int], list[np.ndarray]] = {}  # what was in a group, by axis
    for group in before.groups:
        for s in group.slices:
            free.setdefault((s.network, s.tensor, s.dim), []).append(s.index)
    held = [np.zeros(0, int)]
    for axis in seen.axes:
        gone = dropped.get((axis.network, axis.tensor), {}).get(axis.dim, np.zeros(0, int))
        stays = np.setdiff1d(np.arange(len(axis.nodes) + len(gone)), gone)  # [n] as it was counted
        inside = free.get((axis.network, axis.tensor, axis.dim), [np.zeros(0, int)])
        held.append(seen.classes[axis.nodes[~np.isin(stays, np.concatenate(inside))]])
    fixed = [one for one in before.fixed if one not in seen.fixed]
    return _structure(computation, _hold(seen, np.concatenate(held), fixed))


def _hold(seen: Trace, held: np.ndarray, fixed: list[Fixed]) -> Trace:
    """What was seen, with these classes tied to the outside, and why."""
    classes = seen.classes.copy()
    classes[np.isin(classes, held)] = classes[OUTSIDE]
    classes = np.unique(classes, return_inverse=True)[1]  # numbered without gaps
    return replace(seen, classes=classes, fixed=(*seen.fixed, *fixed))


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
