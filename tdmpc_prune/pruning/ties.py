"""What is tied to what: the books that rules write into while a computation runs (ours).

Every index along every dimension of every parameter and buffer is a node. The labels of a tensor
are, for each of its dimensions, the nodes of its indices, or None where it is no channel. Nodes
that are tied stay or go together. A channel that meets something from outside (an observation, an
action, an output) is tied to the node `OUTSIDE`, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdmpc_prune.errors import UserError

OUTSIDE = 0  # the node of everything that is not ours to cut

Labels = tuple[np.ndarray | None, ...]  # per dimension: the node of each index, or no nodes
Sizes = Iterable[tuple[int, np.ndarray | None]]  # dimensions, and their nodes if they carry any


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

    @staticmethod
    def of(component: str, sizes: Sizes) -> Count:
        """The product of `sizes`."""
        sizes = list(sizes)
        constant = math.prod(size for size, nodes in sizes if nodes is None)
        return Count(component, constant, tuple(nodes for _, nodes in sizes if nodes is not None))


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


class Running:
    """Which module runs now, by hooks on all of them."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        self._stack: list[tuple[str, str, nn.Module]] = []
        for network, root in networks.items():
            for path, module in root.named_modules():
                place = network, path
                module.register_forward_pre_hook(
                    lambda module, _, place=place: self._stack.append((*place, module))
                )
                module.register_forward_hook(lambda *_: self._leave())

    def _leave(self) -> None:
        self._stack.pop()

    @property
    def innermost(self) -> tuple[str, str, nn.Module] | None:
        """Network, path and module; None between them."""
        return self._stack[-1] if self._stack else None

    def component(self) -> str:
        """The component that is computed with."""
        inside = (m.component for _, _, m in reversed(self._stack) if hasattr(m, "component"))
        return next(inside, "other")

    def place(self) -> str:
        """Where the computation is, for people."""
        if not self._stack:
            return "the computation"
        network, path, _ = self._stack[-1]
        return f"'{path}'" if path else f"network '{network}'"


class Ties:
    """Labels of tensors, ties and counts. Label arrays are interned: equal ones are one object.

    Attributes:
        running: which module runs.
        reason: what ties now, for people.
        counting: whether products are counted.
        axes: of all parameters and buffers.
    """

    def __init__(self, networks: Mapping[str, nn.Module], running: Running):
        """Give nodes to all parameters and buffers; the first network is the counted one.

        Raises:
            UserError: a counted parameter belongs to no component.
        """
        self.running = running
        self.reason = ""
        self.counting = False
        self._node_count = 1  # OUTSIDE
        self._arrays: dict[bytes, np.ndarray] = {}
        self._labels: dict[int, tuple[Tensor, Labels]] = {}  # keeps the tensor, so its id, alive
        self._ties: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._why: dict[tuple[int, int], str] = {}  # of ties to the outside
        self._written: set[int] = set()
        self._used: set[int] = set()
        self._macs: dict[tuple, Count] = {}
        self._bare_norms: dict[tuple[str, str], np.ndarray] = {}
        self.axes: list[Axis] = []
        self._parameters: list[Count] = []
        self._parameter_names: dict[int, str] = {}
        self._counted = next(iter(networks), "")
        for network, root in networks.items():
            self._register(network, root)

    def _register(self, network: str, root: nn.Module) -> None:
        counted = network == self._counted
        for path, module in root.named_modules():
            parameters = list(module.named_parameters(recurse=False))
            if counted and parameters and not hasattr(module, "component"):
                raise UserError(f"module '{path}' has parameters but belongs to no component")
            for name, tensor in [*parameters, *module.named_buffers(recurse=False)]:
                if id(tensor) in self._labels:
                    continue  # shared with a module before
                name = f"{path}.{name}" if path else name
                labels = tuple(self._new_nodes(size) for size in tensor.shape)
                self._labels[id(tensor)] = (tensor, labels)
                self.axes += [
                    Axis(network, name, dim, nodes)
                    for dim, nodes in enumerate(labels)
                    if nodes is not None
                ]
                if isinstance(tensor, nn.Parameter):
                    self._parameter_names[id(tensor)] = f"{network}.{name}"
                    if counted:
                        sizes = zip(tensor.shape, labels, strict=True)
                        self._parameters.append(Count.of(module.component, sizes))
        for path, module in root.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                why = f"nn.MultiheadAttention '{path}' keeps it in attributes"
                self.leaves(list(module.parameters()), why)

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
                self._why[key] = self.reason

    def writes(self, nodes: np.ndarray | None) -> None:
        """Note that a product's results are these nodes: they name the group."""
        if nodes is not None:
            self._written.add(int(nodes[0]))

    def count_macs(self, sizes: Sizes) -> None:
        """Count a product whose multiply-accumulates are the product of `sizes`."""
        if not self.counting:
            return
        count = Count.of(self.running.component(), sizes)
        key = (count.component, tuple(sorted(id(nodes) for nodes in count.factors)))
        before = self._macs[key].constant if key in self._macs else 0
        self._macs[key] = Count(count.component, before + count.constant, count.factors)

    def note_bare_norm(self, nodes: np.ndarray) -> None:
        """Remember a LayerNorm without weights: only its module knows its width."""
        network, path, module = self.running.innermost
        if isinstance(module, nn.LayerNorm):
            self._bare_norms[network, path] = nodes

    # --- What the watcher uses --------------------------------------------------------------

    def uses(self, tensors: Iterable[Tensor]) -> None:
        """Note that these take part in the computation."""
        self._used.update(map(id, tensors))

    def label(self, tensor: Tensor, labels: Labels) -> None:
        """Give a result its labels; what has become a single channel is none any more."""
        sizes = zip(tensor.shape, labels, strict=True)
        kept = tuple(None if size == 1 else nodes for size, nodes in sizes)
        self._labels[id(tensor)] = (tensor, kept)

    def leaves(self, outputs: Any, why: str = "it leaves the computation") -> None:
        """Tie the tensors in `outputs` to the outside."""
        self.reason = why
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                for nodes in self.labels(tensor):
                    self.tie(nodes, None)

    def result(self, numbers: tuple[Number, ...]) -> Trace:
        """What was seen.

        Raises:
            UserError: a parameter took no part.
        """
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
            axes=tuple(self.axes),
            classes=classes,
            written=frozenset(self._written),
            parameters=tuple(self._parameters),
            macs=tuple(self._macs.values()),
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
        for axis in self.axes:
            layer = axis.tensor.rpartition(".")[0]
            written = axis.network == self._counted and int(axis.nodes[0]) in self._written
            outside = (classes[axis.nodes] == classes[OUTSIDE]).all()
            if written and outside and layer not in seen:
                seen.add(layer)
                yield Fixed(layer, len(axis.nodes), why[int(among[axis.nodes[0]])])
