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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.rules import Labels, UnknownOperation, find_rule

OUTSIDE = 0  # the node of everything that is not ours to cut


@dataclass(frozen=True)
class Computation:
    """What is traced.

    Attributes:
        networks: named modules whose parts carry component tags. The first is the one that is
            counted; the others follow it (a target network).
        run: gets copies of them on the meta device, does with them everything that the program
            does, and returns what leaves it: outputs, but no latents.
        cost: does what is to be counted, such as one decision; None counts nothing.
    """

    networks: dict[str, nn.Module]
    run: Callable[[dict[str, nn.Module]], Any]
    cost: Callable[[dict[str, nn.Module]], Any] | None = None


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
class Trace:
    """What was seen."""

    axes: tuple[Axis, ...]
    classes: np.ndarray  # [nodes] tied nodes have the same number
    written: frozenset[int]  # first nodes of the axes that products write
    parameters: tuple[Count, ...]  # elements, of the counted network
    macs: tuple[Count, ...]  # multiply-accumulates of `cost`
    bare_norms: tuple[tuple[str, str, np.ndarray], ...]  # (network, LayerNorm, nodes), no weights


def trace(computation: Computation) -> Trace:
    """Run a computation and see which channels it ties.

    Raises:
        UnknownOperation: there is no rule for an operation on a prunable channel.
        UserError: a parameter takes no part in the computation, or belongs to no component.
    """
    networks = _without_data(computation.networks)
    watcher = Watcher(networks)
    with torch.no_grad(), watcher:
        watcher.leaves(computation.run(networks))
        if computation.cost is not None:
            watcher.counting = True
            watcher.leaves(computation.cost(networks))
    return watcher.result()


def _without_data(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies on the meta device. What the originals share, the copies share."""
    copies: dict[int, Any] = {}
    for network in networks.values():
        for parameter in network.parameters():
            empty = torch.empty_like(parameter, device="meta")
            copies[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        for buffer in network.buffers():
            copies[id(buffer)] = torch.empty_like(buffer, device="meta")
    return {name: module.eval() for name, module in copy.deepcopy(networks, copies).items()}


class Watcher(TorchDispatchMode):
    """Sees every operation, and keeps the books: labels of tensors, ties, counts.

    The labels of a tensor are, for each of its dimensions, the nodes of its indices, or None where
    it is no channel. Label arrays are interned: equal ones are one object.
    """

    def __init__(self, networks: dict[str, nn.Module]):
        super().__init__()
        self.counting = False
        self._node_count = 1  # OUTSIDE
        self._arrays: dict[bytes, np.ndarray] = {}
        self._labels: dict[int, tuple[Tensor, Labels]] = {}  # keeps the tensor, so its id, alive
        self._ties: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._written: set[int] = set()
        self._used: set[int] = set()
        self._macs: dict[tuple, int] = {}
        self._bare_norms: dict[tuple[str, str], np.ndarray] = {}
        self._running: list[tuple[str, str, nn.Module]] = []  # (network, path, module)
        self._axes: list[Axis] = []
        self._parameters: list[Count] = []
        self._parameter_names: dict[int, str] = {}
        for number, (name, network) in enumerate(networks.items()):
            self._register(name, network, counted=number == 0)

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
        self._ties[id(one), id(other)] = (one, other)

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
        return f"'{self._running[-1][1]}'" if self._running else "the computation"

    @staticmethod
    def _count(component: str, sizes: Iterable[tuple[int, np.ndarray | None]]) -> Count:
        sizes = list(sizes)
        constant = math.prod(size for size, nodes in sizes if nodes is None)
        return Count(component, constant, tuple(n for _, n in sizes if n is not None))

    # --- Watching ---------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._used.update(map(id, tensors))
        if not any(nodes is not None for tensor in tensors for nodes in self.labels(tensor)):
            return result
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

    def leaves(self, outputs: Any) -> None:
        """Whatever is returned goes outside."""
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                for nodes in self.labels(tensor):
                    self.tie(nodes, None)

    def result(self) -> Trace:
        unused = [name for key, name in self._parameter_names.items() if key not in self._used]
        if unused:
            raise UserError(
                f"parameter '{unused[0]}' takes no part in the traced computation, so what it is "
                f"tied to is unknown ({len(unused)} such parameters)"
            )
        ties = list(self._ties.values())
        one = np.concatenate([tie[0] for tie in ties] or [np.zeros(0, int)])
        other = np.concatenate([tie[1] for tie in ties] or [np.zeros(0, int)])
        size = self._node_count
        graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(size, size))
        classes = connected_components(graph, directed=False)[1]
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
        )
