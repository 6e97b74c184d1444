"""Numbers that enter the arithmetic beside tensors must not depend on the widths (ours).

A division by `sqrt(x.shape[-1])` divides by another number once channels are cut, and the network
computes another function for what is left. The computation is run at other widths to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation
from tdmpc_prune.pruning.sizes import attribute_sizes
from tdmpc_prune.pruning.structure import Structure, size_of
from tdmpc_prune.pruning.ties import Number
from tdmpc_prune.pruning.tracing import in_one_line, numbers_in, owners, without_data


def difference_when_wider(
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
