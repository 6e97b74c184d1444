"""Find out which channels of which tensors are tied, by watching a computation run (ours).

Every index along every dimension of every parameter and buffer is a node. The computation runs on
meta tensors (shapes without data); each operation that PyTorch executes hands the nodes of its
inputs' dimensions on to its outputs, and ties those that it brings together: the columns of a
weight and the channels that they multiply, the operands of an addition, the two sides of a loss.
Nodes that are tied stay or go together. A channel that meets something from outside (an
observation, an action, an output) is tied to the node `OUTSIDE`, and stays.

The rules, one per operation, are in `rules.py`. An operation without one is an error that names it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation
from tdmpc_prune.pruning.rules import Labels, UnknownOperation, find_rule

OUTSIDE = 0  # the node of everything that is not ours to cut

_TO_BE_FILLED = {"zeros", "ones", "full", "empty"}  # operations that make a tensor


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter or buffer, and the node of each index along it."""

    network: str
    tensor: str
    dim: int
    nodes: np.ndarray


@dataclass(frozen=True)
class Count:
    """A product of sizes: the elements of a parameter, or the multiply-accumulates of a product."""

    component: str
    constant: int  # of the sizes that carry no nodes
    factors: tuple[np.ndarray, ...]  # the nodes of the sizes that do


@dataclass(frozen=True)
class Fixed:
    """A width that a layer of the counted network writes, and that cannot be cut."""

    layer: str
    width: int
    why: str


@dataclass(frozen=True)
class Number:
    """What entered the arithmetic of one operation beside tensors: factors, exponents, fills."""

    place: str  # for people
    operation: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Trace:
    """What was seen."""

    axes: tuple[Axis, ...]
    classes: np.ndarray  # [nodes] tied nodes have the same number
    written: frozenset[int]  # first nodes of the axes that products write
    parameters: tuple[Count, ...]  # elements, of the counted network
    macs: tuple[Count, ...]  # multiply-accumulates of `cost`
    bare_norms: tuple[tuple[str, str, np.ndarray], ...]  # (network, LayerNorm, nodes), no weights
    fixed: tuple[Fixed, ...]
    numbers: tuple[Number, ...]  # of `run`, in order


def trace(computation: Computation) -> Trace:
    """Run a computation and see which channels it ties.

    Raises:
        UnknownOperation: there is no rule for an operation on a prunable channel.
        UserError: a parameter takes no part in the computation, or belongs to no component; or
            the computation does not run on tensors without data, and in which module.
    """
    networks = without_data(computation.networks)
    watcher = Watcher(networks)
    with _running(watcher):
        watcher.leaves(computation.run(networks))
        numbers = tuple(watcher.numbers)
        if computation.cost is not None:
            watcher.counting = True
            watcher.leaves(computation.cost(networks))
    return watcher.result(numbers)


def numbers_in(computation: Computation, networks: dict[str, nn.Module]) -> tuple[Number, ...]:
    """What enters the arithmetic beside tensors when `run` gets these copies (`without_data`).

    Raises:
        UserError: see `trace`.
    """
    watcher = Watcher(networks)
    with _running(watcher):
        computation.run(networks)
    return tuple(watcher.numbers)


@contextmanager
def _running(watcher: Watcher) -> Iterator[None]:
    """Watch what is run, leave nothing behind, and say where it could not go on."""
    validated = Distribution._validate_args  # it would look at values, and there are none
    Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()), watcher:
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{watcher.place()} cannot be traced: {in_one_line(error)} (it is run on tensors "
            f"without data, so what it does may depend on their shapes, but not on their values)"
        ) from error
    finally:
        Distribution.set_default_validate_args(validated)


def in_one_line(error: Exception) -> str:
    """What an error says, for people; its type where it says nothing or too little."""
    text = " ".join(str(error).split())
    if isinstance(error, (RuntimeError, ValueError, UserError)) and text:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def without_data(
    networks: dict[str, nn.Module],
    shapes: Mapping[tuple[str, str], tuple[int, ...]] | None = None,
) -> dict[str, nn.Module]:
    """Copies on the meta device. What the originals share, the copies share.

    Args:
        networks: by name.
        shapes: (network, parameter or buffer) → another shape.

    Raises:
        UserError: a network holds what cannot be copied.
    """
    copies: dict[int, Any] = {}
    for (network, name), (_, tensor) in owners(networks).items():
        if id(tensor) not in copies:
            empty = torch.empty_like(tensor, device="meta")
            if shapes and (network, name) in shapes:
                empty = empty.new_empty(shapes[network, name])
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=False)
            copies[id(tensor)] = empty
    try:
        with _LeaveResultsOut():
            copied = copy.deepcopy(networks, copies)
    except Exception as error:
        raise UserError(f"the networks cannot be copied: {in_one_line(error)}") from error
    return {name: module.eval() for name, module in copied.items()}


class _LeaveResultsOut(TorchFunctionMode):
    """While copying: results that modules have kept (activations) become tensors without data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return torch.empty_like(args[0].detach(), device="meta")
        return func(*args, **(kwargs or {}))


def owners(networks: dict[str, nn.Module]) -> dict[tuple[str, str], tuple[nn.Module, Tensor]]:
    """(network, name of a parameter or buffer) → the module that holds it, and itself."""
    return {
        (network, f"{path}.{name}" if path else name): (module, tensor)
        for network, root in networks.items()
        for path, module in root.named_modules()
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
    }


class Watcher(TorchDispatchMode):
    """Sees every operation, and keeps the books: labels of tensors, ties, counts.

    The labels of a tensor are, for each of its dimensions, the nodes of its indices, or None where
    it is no channel. Label arrays are interned: equal ones are one object.
    """

    def __init__(self, networks: dict[str, nn.Module]):
        super().__init__()
        self.counting = False
        self.numbers: list[Number] = []
        self._node_count = 1  # OUTSIDE
        self._arrays: dict[bytes, np.ndarray] = {}
        self._labels: dict[int, tuple[Tensor, Labels]] = {}  # keeps the tensor, so its id, alive
        self._ties: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._why: dict[tuple[int, int], str] = {}  # of ties to the outside
        self._tying = ""  # what ties now, for people
        self._made: dict[int, Tensor] = {}  # from nothing, inside a module
        self._written: set[int] = set()
        self._used: set[int] = set()
        self._macs: dict[tuple, int] = {}
        self._bare_norms: dict[tuple[str, str], np.ndarray] = {}
        self._running: list[tuple[str, str, nn.Module]] = []  # (network, path, module)
        self._axes: list[Axis] = []
        self._parameters: list[Count] = []
        self._parameter_names: dict[int, str] = {}
        self._counted = next(iter(networks), "")
        for name, network in networks.items():
            self._register(name, network, counted=name == self._counted)

    def _register(self, network: str, root: nn.Module, counted: bool) -> None:
        """Give nodes to a network's parameters and buffers, and follow which module runs."""
        for path, module in root.named_modules():
            module.register_forward_pre_hook(
                lambda module, _, path=path: self._running.append((network, path, module))
            )
            module.register_forward_hook(lambda *_: self._leave_module())
            parameters = list(module.named_parameters(recurse=False))
            if counted and parameters and not hasattr(module, "component"):
                raise UserError(f"module '{path}' has parameters but belongs to no component")
            for name, tensor in [*parameters, *module.named_buffers(recurse=False)]:
                if id(tensor) in self._labels:
                    continue  # shared with a module before
                name = f"{path}.{name}" if path else name
                labels = tuple(self._new_nodes(size) for size in tensor.shape)
                self._labels[id(tensor)] = (tensor, labels)
                self._axes += [
                    Axis(network, name, dim, nodes)
                    for dim, nodes in enumerate(labels)
                    if nodes is not None
                ]
                if isinstance(tensor, nn.Parameter):
                    self._parameter_names[id(tensor)] = f"{network}.{name}"
                    if counted:
                        count = self._count(
                            module.component, zip(tensor.shape, labels, strict=True)
                        )
                        self._parameters.append(count)
        for path, module in root.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self._tying = f"nn.MultiheadAttention '{path}' keeps it in attributes"
                for tensor in module.parameters():
                    for nodes in self.labels(tensor):
                        self.tie(nodes, None)

    def _leave_module(self) -> None:
        self._running.pop()

    def _new_nodes(self, size: int) -> np.ndarray | None:
        """Nodes for a dimension. One of size 1 needs none: nothing can be cut from it."""
        if size <= 1:
            return None
        nodes = self.array(np.arange(self._node_count, self._node_count + size))
        self._node_count += size
        return nodes

    # --- What the rules use -----------------------------------------------------------------

    def array(self, nodes: np.ndarray) -> np.ndarray:
        """The one object for these nodes."""
        return self._arrays.setdefault(nodes.tobytes(), nodes)

    def labels(self, tensor: Tensor) -> Labels:
        """Per dimension: nodes `[size]`, or None."""
        known = self._labels.get(id(tensor))
        return known[1] if known else (None,) * tensor.dim()

    def tie(self, one: np.ndarray | None, other: np.ndarray | None) -> None:
        """Let nodes `[n]` stay or go with those that they meet; None is the outside."""
        if one is None:
            one, other = other, one
        if one is None or one is other:
            return
        if other is None:
            other = self.array(np.full_like(one, OUTSIDE))
        key = id(one), id(other)
        if key not in self._ties:
            self._ties[key] = (one, other)
            if ((one == OUTSIDE) | (other == OUTSIDE)).any():
                self._why[key] = self._tying

    def writes(self, nodes: np.ndarray | None) -> None:
        """Note that a product's results are these nodes: they name the group."""
        if nodes is not None:
            self._written.add(int(nodes[0]))

    def count_macs(self, sizes: Iterable[tuple[int, np.ndarray | None]]) -> None:
        """Count a product whose multiply-accumulates are the product of `sizes`."""
        if not self.counting:
            return
        component = next(
            (m.component for _, _, m in reversed(self._running) if hasattr(m, "component")), "other"
        )
        count = self._count(component, sizes)
        key = (component, tuple(sorted(id(nodes) for nodes in count.factors)))
        before = self._macs.get(key, (0, ()))[0]
        self._macs[key] = (before + count.constant, count.factors)

    def note_bare_norm(self, nodes: np.ndarray) -> None:
        """Remember a LayerNorm without weights: only its module knows its width."""
        network, path, module = self._running[-1]
        if isinstance(module, nn.LayerNorm):
            self._bare_norms[network, path] = nodes

    def place(self) -> str:
        """Where the computation is, for people."""
        if not self._running:
            return "the computation"
        network, path, _ = self._running[-1]
        return f"'{path}'" if path else f"network '{network}'"

    @staticmethod
    def _count(component: str, sizes: Iterable[tuple[int, np.ndarray | None]]) -> Count:
        sizes = list(sizes)
        constant = math.prod(size for size, nodes in sizes if nodes is None)
        return Count(component, constant, tuple(n for _, n in sizes if n is not None))

    # --- Watching ---------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._used.update(map(id, tensors))
        self._note_numbers(func, args, kwargs)
        args, kwargs = self._drop_data(func, args, kwargs, tensors)
        result = func(*args, **kwargs)
        made = bool(self._running) and all(id(tensor) in self._made for tensor in tensors)
        if made or func.overloadpacket.__name__.startswith("new_"):
            self._made |= {id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)}
        if func is torch.ops.aten._is_all_true.default and tensors[0].is_meta:
            return torch.ones((), dtype=torch.bool)  # a distribution told to validate
        if not any(nodes is not None for tensor in tensors for nodes in self.labels(tensor)):
            return result
        made = any(id(tensor) in self._made for tensor in tensors)
        what = "a tensor made inside forward" if made else "an input, a constant or a position"
        self._tying = f"{func} in {self.place()} ties it to {what}"
        rule = find_rule(func)
        if rule is None:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise UnknownOperation(
                f"operation {func} on a prunable channel in {self.place()} (shapes {shapes}) has "
                f"no pruning rule; write it with known operations, or add one to pruning/rules.py"
            )
        names = [argument.name for argument in func._schema.arguments]
        given = {a.name: a.default_value for a in func._schema.arguments}
        given |= dict(zip(names, args, strict=False)) | kwargs
        found = rule(self, given, result)
        outputs = [result] if isinstance(result, Tensor) else list(result or ())
        if isinstance(found, tuple):
            found = [found] * len(outputs)
        for output, labels in zip(outputs, found, strict=False):
            if isinstance(output, Tensor) and len(labels) == output.dim():
                sizes = zip(output.shape, labels, strict=True)
                kept = tuple(None if size == 1 else nodes for size, nodes in sizes)
                self._labels[id(output)] = (output, kept)
        return result

    def _drop_data(self, func, args: tuple, kwargs: dict, tensors: list[Tensor]):
        """Arguments for an operation on tensors without data.

        A tensor of the program's own (a constant, a plain attribute) keeps its data until it meets
        one that has none; what is made to be filled (zeros) never has any.
        """
        name = func.overloadpacket.__name__
        empty = any(tensor.is_meta for tensor in tensors)
        if kwargs.get("device") is not None and (empty or name in _TO_BE_FILLED):
            kwargs = kwargs | {"device": torch.device("meta")}
        if empty and not all(tensor.is_meta for tensor in tensors):
            written = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            if any(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in written):
                raise UserError(
                    f"{func} in {self.place()} writes into a tensor that has values already: "
                    f"make it with torch.zeros, or register it as a buffer"
                )
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        return args, kwargs

    def _note_numbers(self, func, args: tuple, kwargs: dict) -> None:
        """Remember what enters an operation's arithmetic beside tensors; sizes do not."""
        values: list[float] = []
        if func.overloadpacket.__name__ == "arange":  # its ends are sizes
            return
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            kind = str(argument.type).lower()
            if "int" in kind or "bool" in kind:  # sizes, dimensions and switches
                continue
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
                    value = value.item()
                if isinstance(value, (int, float)):
                    values.append(float(value))
        self.numbers.append(Number(self.place(), str(func), tuple(values)))

    def leaves(self, outputs: Any) -> None:
        """Whatever is returned goes outside."""
        self._tying = "it leaves the computation"
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                for nodes in self.labels(tensor):
                    self.tie(nodes, None)

    def result(self, numbers: tuple[Number, ...]) -> Trace:
        unused = [name for key, name in self._parameter_names.items() if key not in self._used]
        if unused:
            raise UserError(
                f"parameter '{unused[0]}' takes no part in the traced computation, so what it is "
                f"tied to is unknown ({len(unused)} such parameters)"
            )
        ties = list(self._ties.values())
        one = np.concatenate([tie[0] for tie in ties] or [np.zeros(0, int)])
        other = np.concatenate([tie[1] for tie in ties] or [np.zeros(0, int)])
        classes = self._classes(one, other)
        return Trace(
            axes=tuple(self._axes),
            classes=classes,
            written=frozenset(self._written),
            parameters=tuple(self._parameters),
            macs=tuple(
                Count(component, constant, factors)
                for (component, _), (constant, factors) in self._macs.items()
            ),
            bare_norms=tuple((*key, nodes) for key, nodes in self._bare_norms.items()),
            fixed=tuple(self._fixed(classes, one, other)),
            numbers=numbers,
        )

    def _classes(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The class of every node, if `one` and `other` (nodes) are tied."""
        shape = (self._node_count, self._node_count)
        graph = coo_array((np.ones(len(one), bool), (one, other)), shape=shape)
        return connected_components(graph, directed=False)[1]

    def _fixed(self, classes: np.ndarray, one: np.ndarray, other: np.ndarray) -> Iterator[Fixed]:
        """The widths that layers of the counted network write and that are outside, with what
        ties them to it: the first such tie of any node that they are tied to."""
        inside = (one != OUTSIDE) & (other != OUTSIDE)
        among = self._classes(one[inside], other[inside])
        why: dict[int, str] = {}
        for key, text in self._why.items():
            left, right = self._ties[key]
            nodes = np.concatenate([left[right == OUTSIDE], right[left == OUTSIDE]])
            for number in np.unique(among[nodes]).tolist():
                why.setdefault(number, text)
        seen: set[str] = set()
        for axis in self._axes:
            layer = axis.tensor.rpartition(".")[0]
            written = axis.network == self._counted and int(axis.nodes[0]) in self._written
            outside = (classes[axis.nodes] == classes[OUTSIDE]).all()
            if written and outside and layer not in seen:
                seen.add(layer)
                yield Fixed(layer, len(axis.nodes), why[int(among[axis.nodes[0]])])
