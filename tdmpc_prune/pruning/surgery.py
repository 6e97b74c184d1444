"""Carry out a plan: cut networks and optimisers together, or change nothing (ours).

Parameters stay the same objects with smaller data, so that optimisers, hooks and whoever else holds
them need not be told. After the cut the computation is traced again: if it does not run, ties its
channels in another way, or calculates with other numbers, the cut is undone.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation
from tdmpc_prune.pruning.groups import groups_left
from tdmpc_prune.pruning.numbers import difference, numbers_at
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.sizes import attribute_sizes
from tdmpc_prune.pruning.structure import Structure, size_of
from tdmpc_prune.pruning.ties import Number
from tdmpc_prune.pruning.tracing import in_one_line, numbers_in, owners, without_data


class SurgeryError(RuntimeError):
    """A cut network does not compute what was planned; the cut has been undone."""


def kept_units(plan: Plan) -> dict[str, np.ndarray]:
    """Group → its units that stay, ascending."""
    return {
        name: np.setdiff1d(np.arange(width), plan.removed.get(name, []))
        for name, width in plan.widths.items()
    }


def commit(
    plan: Plan,
    structure: Structure,
    computation: Computation,
    optimisers: Iterable[torch.optim.Optimizer] = (),
) -> Structure:
    """Carry out a plan; see `committing`."""
    with committing(plan, structure, computation, optimisers) as left:
        return left


@contextlib.contextmanager
def committing(
    plan: Plan,
    structure: Structure,
    computation: Computation,
    optimisers: Iterable[torch.optim.Optimizer] = (),
) -> Iterator[Structure]:
    """Cut all networks of the computation, and the optimisers' moments.

    If the body raises, the cut is taken back.

    Args:
        plan: what to cut.
        structure: the groups of `computation`, as they are.
        computation: its networks are cut in place.
        optimisers: of any of their parameters.

    Yields:
        The groups that are left.

    Raises:
        UserError: the plan does not fit the structure.
        SurgeryError: what is left is not what was planned, or an optimiser keeps what cannot be
            cut. Nothing is changed then.
    """
    plan.check(structure)
    cut = _Cut()
    try:
        places = owners(computation.networks)
        dropped = _dropped_indices(plan, structure)
        cuts = {id(places[at][1]): (f"'{at[1]}'", dims) for at, dims in dropped.items()}
        moments = list(_cut_moments(optimisers, cuts))
        uncut = without_data(computation.networks)
        modules = list({id(module): module for module, _ in places.values()}.values())
        sizes = [attribute_sizes(module) for module in modules]
        for place, dims in dropped.items():
            tensor = places[place][1]
            cut.replace(tensor, _select(tensor.data, dims))
        for state, key, moment in moments:
            cut.put(state, key, moment)
        for module, before in zip(modules, sizes, strict=True):
            for name, size in attribute_sizes(module).items():
                if size != before[name] and name in module.__dict__:
                    cut.put(module.__dict__, name, size)
        after = plan.widths_after
        for network, path, width in structure.bare_norms:
            norm = computation.networks[network].get_submodule(path)
            shape = (*norm.normalized_shape[:-1], size_of(width, after))
            cut.put(norm.__dict__, "normalized_shape", shape)
        left = groups_left(computation, structure, dropped)
        # One channel that is left alone is a width of 1, and no group any more.
        same = all(left.widths.get(name, 1) == width for name, width in after.items())
        if not same or not set(left.widths) <= set(after):
            raise SurgeryError(f"the cut left the widths {left.widths} instead of {after}")
        if changed := _changed(computation, structure, left, uncut):
            raise SurgeryError(f"the cut network computes another function: {changed}")
    except BaseException as error:
        cut.undo()
        if not isinstance(error, Exception):  # an interrupt
            raise
        what = in_one_line(error)
        if not isinstance(error, SurgeryError):
            what = f"the cut network does not run: {what}"
        groups = " and ".join(f"'{name}'" for name in _to_blame(plan, structure, computation))
        raise SurgeryError(
            f"{groups or 'the network'} cannot be cut, and nothing was: {what}"
        ) from error
    try:
        yield left
    except BaseException:
        cut.undo()
        raise


def _changed(
    computation: Computation, before: Structure, left: Structure, uncut: dict[str, nn.Module]
) -> str:
    """How a cut changed the numbers that enter the arithmetic, for people; "" if it did not.

    Args:
        computation: as it is now.
        before: its groups before the cut; what the program has set since (a temperature) is in
            `uncut` alone.
        left: its groups now.
        uncut: copies without data of the networks before the cut.
    """

    def again() -> tuple[Number, ...]:
        return numbers_in(computation, without_data(computation.networks))

    if not difference(before.numbers, left.numbers, again):
        return ""
    return difference(numbers_in(computation, uncut), left.numbers, again)


def _to_blame(plan: Plan, structure: Structure, computation: Computation) -> list[str]:
    """The groups that cannot be cut even alone; all that were to be cut if there are none."""
    found = []
    for name in plan.removed:
        widths = structure.widths | {name: plan.widths_after[name]}
        again = partial(numbers_at, computation, structure, widths)
        try:
            alike = not difference(structure.numbers, again(), again)
        except UserError:
            alike = False
        if not alike:
            found.append(name)
    return found or list(plan.removed)


class _Cut:
    """What has been changed so far, and how to take it back."""

    def __init__(self) -> None:
        self._before: list = []
        self._guards: list = []  # on graphs that were recorded before the cut

    def replace(self, tensor: Tensor, data: Tensor) -> None:
        """Give a parameter or buffer other data; its gradient is of the old shape, and goes."""
        self._before.append((tensor, tensor.data, tensor.grad))
        if tensor.requires_grad:
            # While a loss is alive its graph's last node is, and that remembers the shape. PyTorch
            # lets go of it where the type changes; what was recorded with it is of no use then.
            node = torch.autograd.graph.get_gradient_edge(tensor).node
            self._guards.append(node.register_prehook(_too_old))
            other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
            tensor.grad = None
            tensor.data = tensor.data.new_empty(0, dtype=other)
        tensor.grad = None
        tensor.data = data

    def put(self, place: dict, key: str, value) -> None:
        self._before.append((place, key, place[key]))
        place[key] = value

    def undo(self) -> None:
        for guard in self._guards:
            guard.remove()
        for first, second, third in reversed(self._before):
            if isinstance(first, dict):
                first[second] = third
            else:
                first.grad = None
                first.data = second
                first.grad = third


def _too_old(_: Any) -> None:
    raise RuntimeError("this loss was computed before the network was cut: compute it again")


# --- Optimisers -----------------------------------------------------------------------------


def _cut_moments(
    optimisers: Iterable[torch.optim.Optimizer],
    cuts: Mapping[int, tuple[str, dict[int, np.ndarray]]],
) -> Iterator[tuple[dict, str, Tensor]]:
    """(state, key, what is left) for all that optimisers keep of parameters that are cut.

    Args:
        optimisers: they may have others inside of them.
        cuts: id of a parameter → its name, and dimension → indices to drop.

    Raises:
        SurgeryError: something is kept of which it is not certain how it has to be cut.
    """
    for optimiser in optimisers:
        inner = (v for v in vars(optimiser).values() if isinstance(v, torch.optim.Optimizer))
        yield from _cut_moments(inner, cuts)
        if not any(id(p) in cuts for group in optimiser.param_groups for p in group["params"]):
            continue
        _refuse_tensors_beside(optimiser)
        ways = _ways(optimiser.state)
        for parameter, state in optimiser.state.items():
            for key, value in state.items():
                if all(tensor.numel() <= 1 for tensor in _tensors(value)):  # counters
                    continue
                name, dims = cuts.get(id(parameter), ("a parameter that stays as it is", {}))
                possible = {
                    tuple((own, dim) for own, dim in enumerate(way) if dim in dims)
                    for way in ways.get((key, parameter.dim()), ())
                }
                if len(possible) != 1:
                    shape = f" {list(value.shape)}" if isinstance(value, Tensor) else ""
                    raise SurgeryError(
                        f"how '{key}'{shape} that {type(optimiser).__name__} keeps of {name} "
                        f"{list(parameter.shape)} has to be cut is not certain; reset it before "
                        f"the cut (optimiser.state.clear()), or make a new optimiser after it"
                    )
                if along := possible.pop():
                    yield state, key, _select(value, {own: dims[dim] for own, dim in along})


def _ways(state: Mapping[Tensor, dict]) -> dict[tuple[str, int], set[tuple[int | None, ...]]]:
    """What the dimensions of an optimiser's state may be.

    For a key and a number of dimensions of the parameter, each way says for every dimension of the
    state which one of the parameter's it is, or None where the state has one value for all. A
    moment has all of them, a factored one some. A key means the same for all parameters of an
    optimiser, so what could be rows or columns of a square matrix is told by the others; and a key
    that fits one of them in no way is not understood at all.
    """
    ways: dict[tuple[str, int], set[tuple[int | None, ...]]] = {}
    for parameter, kept in state.items():
        for key, value in kept.items():
            if all(tensor.numel() <= 1 for tensor in _tensors(value)):
                continue
            own: set[tuple[int | None, ...]] = set()
            if isinstance(value, Tensor):
                whole, sizes = tuple(parameter.shape), tuple(value.shape)
                if len(sizes) == len(whole):
                    choices = [
                        ([None] if size == 1 else []) + ([dim] if size == full else [])
                        for dim, (size, full) in enumerate(zip(sizes, whole, strict=True))
                    ]
                    own = set(product(*choices))
                else:
                    parts = combinations(range(len(whole)), len(sizes))
                    own = {part for part in parts if tuple(whole[d] for d in part) == sizes}
            place = key, parameter.dim()
            ways[place] = ways.get(place, own) & own
    unknown = {key for (key, _), own in ways.items() if not own}
    return {place: own for place, own in ways.items() if place[0] not in unknown}


def _refuse_tensors_beside(optimiser: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that keeps tensors elsewhere than by parameter, in its state."""
    kind = type(optimiser).__name__
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    places = {
        f"attribute '{key}'": value
        for key, value in vars(optimiser).items()
        if key not in ("state", "param_groups", "defaults")
    }
    places |= {
        f"'{key}' of a parameter group": value
        for group in optimiser.param_groups
        for key, value in group.items()
    }
    for place, value in places.items():
        if any(t.numel() > 1 and id(t) not in held for t in _tensors(value)):
            raise SurgeryError(
                f"{kind} keeps tensors in its {place}, and how they have to be cut is not known; "
                f"make a new optimiser after the cut"
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, nested in whatever containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple, set, deque)):
        for part in value:
            yield from _tensors(part)


# --- What goes ------------------------------------------------------------------------------


def _dropped_indices(
    plan: Plan, structure: Structure
) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """(network, tensor) → dimension → indices to drop, of every tensor that is cut."""
    dropped: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for group in structure.groups:
        units = plan.removed.get(group.name)
        if not units:
            continue
        for s in group.slices:
            dims = dropped.setdefault((s.network, s.tensor), {})
            gone = s.index[np.isin(s.unit, units)]
            dims[s.dim] = np.union1d(dims.get(s.dim, np.zeros(0, int)), gone)
    return dropped


def _select(tensor: Tensor, dropped: dict[int, np.ndarray]) -> Tensor:
    """What is left of a tensor."""
    for dim, indices in dropped.items():
        left = np.setdiff1d(np.arange(tensor.shape[dim]), indices)
        tensor = tensor.index_select(dim, torch.from_numpy(left).to(tensor.device))
    return tensor
