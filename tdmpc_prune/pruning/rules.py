"""What each PyTorch operation does to channels: one rule per operation (ours).

A rule gets the ties so far, the operation's arguments by name and its result; it ties what the
operation brings together and returns the labels of the result (or a list, one per result). It is
only asked where an argument carries nodes. Dimensions that a rule does not pass on are no channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.ties import OUTSIDE, Labels, Ties

Rule = Callable[[Ties, dict[str, Any], Any], Labels | list[Labels]]


class UnknownOperation(UserError):
    """The computation does something to a prunable channel that there is no rule for."""


_RULES: dict[str, Rule] = {}


def find_rule(operation: torch._ops.OpOverload) -> Rule | None:
    """The rule for an operation; an in-place one has that of its plain form."""
    name = operation.overloadpacket.__name__.removesuffix("_")
    if name in _RULES:
        return _RULES[name]
    if name.startswith("_foreach_"):
        return _foreach
    return elementwise if torch.Tag.pointwise in operation.tags else None


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by their ATen names."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _refuse(ties: Ties, what: str) -> None:
    raise UnknownOperation(f"{what} in {ties.running.place()} has no pruning rule")


def _only_beside(ties: Ties, labels: Labels, dims, what: str) -> None:
    """Refuse an operation whose result depends on the order or number of prunable channels."""
    if any(labels[dim] is not None for dim in dims):
        _refuse(ties, f"{what} along a prunable dimension")


def _dims(dim: int | list[int] | None, count: int) -> list[int]:
    """Dimensions as non-negative numbers; None or none means all."""
    if dim is None or dim == []:
        return list(range(count))
    return [d % count for d in ([dim] if isinstance(dim, int) else dim)]


# --- One element at a time ------------------------------------------------------------------


@rule("_prelu_kernel", "hardswish", "copy", "_to_copy", "detach", "alias", "lift_fresh")
@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
@rule("bernoulli", "uniform", "normal", "fill", "zero", "native_dropout")
def elementwise(ties: Ties, given: dict[str, Any], result: Any) -> Labels:
    """Operands that meet, after broadcasting, are tied. Every operation that PyTorch itself calls
    pointwise has this rule."""
    return _meet(ties, [value for value in given.values() if isinstance(value, Tensor)])


def _meet(ties: Ties, tensors: list[Tensor]) -> Labels:
    """Tie tensors that are broadcast together, and return their common labels.

    A dimension of size 1, or one that was expanded from it (stride 0), meets anything.
    """
    common: list[np.ndarray | None] = []
    for back in range(1, max(tensor.dim() for tensor in tensors) + 1):
        present = [
            ties.labels(tensor)[-back]
            for tensor in tensors
            if tensor.dim() >= back and tensor.shape[-back] != 1 and tensor.stride(-back) != 0
        ]
        label = next((nodes for nodes in present if nodes is not None), None)
        if label is not None:
            for other in present:
                ties.tie(label, other)
        common.insert(0, label)
    return tuple(common)


def _foreach(ties: Ties, given: dict[str, Any], result: Any) -> list[Labels]:
    lists = [value for value in given.values() if isinstance(value, list) and value]
    lists = [value for value in lists if isinstance(value[0], Tensor)]
    return [_meet(ties, list(tensors)) for tensors in zip(*lists, strict=True)]


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy")
def _loss(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    common = elementwise(ties, given, result)
    return common if result.dim() == len(common) else ()


# --- Shapes ---------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    """Runs of dimensions with equal products are merged or split on their own."""
    source: Tensor = given["self"]
    if "size" not in given:
        _refuse(ties, "a view as another type")
    old, new = list(source.shape), list(result.shape)
    labels = ties.labels(source)
    asked = given["size"]
    found: list[np.ndarray | None] = [None] * len(new)
    for before, after in _runs(old, new):
        run = [(old[d], labels[d]) for d in before]
        if 0 in old[before.start : before.stop]:  # nothing tells which channel came from where
            for _, nodes in run:
                ties.tie(nodes, None)
        elif any(nodes is not None for _, nodes in run):
            places = slice(after.start, after.stop)
            grid = _merge(ties, run).reshape(new[places])
            found[places] = _split(ties, grid, list(asked[places]))
    return tuple(found)


def _runs(old: list[int], new: list[int]) -> Iterator[tuple[range, range]]:
    """Dimensions before and after a view that hold the same elements, in runs as short as can be.

    A tensor without elements matches from the back, as far as no size is zero; the rest is one run.
    """
    if 0 in old:
        ends = [len(sizes) - sizes[::-1].index(0) for sizes in (old, new)]
        while math.prod(old[ends[0] :]) != math.prod(new[ends[1] :]):
            longer = int(math.prod(old[ends[0] :]) < math.prod(new[ends[1] :]))
            ends[longer] += 1
        yield range(ends[0]), range(ends[1])
        for before, after in _runs(old[ends[0] :], new[ends[1] :]):
            yield (
                range(before.start + ends[0], before.stop + ends[0]),
                range(after.start + ends[1], after.stop + ends[1]),
            )
        return
    i = j = 0
    while i < len(old) and j < len(new):
        first_old, first_new = i, j
        i, j = i + 1, j + 1
        while math.prod(old[first_old:i]) != math.prod(new[first_new:j]):
            if math.prod(old[first_old:i]) < math.prod(new[first_new:j]):
                i += 1
            else:
                j += 1
        yield range(first_old, i), range(first_new, j)


def _merge(ties: Ties, run: list[tuple[int, np.ndarray | None]]) -> np.ndarray:
    """The nodes of dimensions flattened into one. Of several channel dimensions (the members of a
    stacked ensemble and their width) the last is the width; the others stay whole."""
    labelled = [place for place, (_, nodes) in enumerate(run) if nodes is not None]
    for place in labelled[:-1]:
        ties.tie(run[place][1], None)
    last = labelled[-1]
    shape = [-1 if place == last else 1 for place in range(len(run))]
    return np.broadcast_to(run[last][1].reshape(shape), [size for size, _ in run]).reshape(-1)


def _split(ties: Ties, grid: np.ndarray, asked: list[int]) -> list[np.ndarray | None]:
    """Labels of the dimensions that a flat one was split into.

    If the nodes vary along one of them, that one carries them. If along several, they are blocks
    (SimNorm): the first dimension, or the one asked for as -1, can shrink by whole blocks.
    """
    labels: list[np.ndarray | None] = [None] * grid.ndim
    varying = [d for d in range(grid.ndim) if (grid != grid.take([0], d)).any()]
    if not varying:  # all alike: a unit that was spread out, or the outside
        varying = [0]
    kept = varying[0]
    free = next((d for d in range(grid.ndim) if asked[d] == -1), None)
    if free is not None and grid.shape[free] == 1:  # a single block: all of it stays or goes
        flat = ties.array(np.ascontiguousarray(grid.reshape(-1)))
        ties.tie(flat, ties.array(np.full_like(flat, flat[0])))
    elif free in varying:
        kept = free
    blocks = np.moveaxis(grid, kept, 0).reshape(grid.shape[kept], -1)
    label = ties.array(np.ascontiguousarray(blocks[:, 0]))
    for column in blocks.T[1:]:
        if not np.array_equal(column, label):
            ties.tie(label, ties.array(np.ascontiguousarray(column)))
    labels[kept] = label
    return labels


@rule("permute")
def _permute(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = ties.labels(given["self"])
    return tuple(labels[d] for d in given["dims"])


@rule("t")
def _t(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    return ties.labels(given["self"])[::-1]


@rule("transpose")
def _transpose(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = list(ties.labels(given["self"]))
    one, other = given["dim0"], given["dim1"]
    labels[one], labels[other] = labels[other], labels[one]
    return tuple(labels)


@rule("unsqueeze")
def _unsqueeze(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = list(ties.labels(given["self"]))
    labels.insert(given["dim"] % result.dim(), None)
    return tuple(labels)


@rule("squeeze")
def _squeeze(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    source: Tensor = given["self"]
    gone = [d for d in _dims(given.get("dim"), source.dim()) if source.shape[d] == 1]
    return tuple(nodes for d, nodes in enumerate(ties.labels(source)) if d not in gone)


@rule("expand")
def _expand(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = ties.labels(given["self"])
    return (None,) * (result.dim() - len(labels)) + labels


@rule("repeat")
def _repeat(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = _expand(ties, given, result)
    pairs = zip(labels, given["repeats"], strict=True)
    return tuple(None if n is None else ties.array(np.tile(n, times)) for n, times in pairs)


# --- Parts and wholes -----------------------------------------------------------------------


@rule("cat")
def _cat(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    tensors = [t for t in given["tensors"] if t.dim() == result.dim()]
    along = given["dim"] % result.dim()
    found = []
    for d in range(result.dim()):
        parts = [ties.labels(t)[d] for t in tensors]
        label = next((nodes for nodes in parts if nodes is not None), None)
        if label is not None and d == along:
            sizes = [t.shape[d] for t in tensors]
            pieces = [
                np.full(size, OUTSIDE) if nodes is None else nodes
                for size, nodes in zip(sizes, parts, strict=True)
            ]
            label = ties.array(np.concatenate(pieces))
        elif label is not None:
            for other in parts:
                ties.tie(label, other)
        found.append(label)
    return tuple(found)


@rule("stack")
def _stack(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = list(_meet(ties, given["tensors"]))
    labels.insert(given["dim"] % result.dim(), None)
    return tuple(labels)


@rule("slice")
def _slice(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    """A part of the channels, by position: all of them stay."""
    labels, dim = list(ties.labels(given["self"])), given["dim"]
    size = given["self"].shape[dim]
    if labels[dim] is not None and result.shape[dim] != size:
        ties.tie(labels[dim], None)
        part = slice(given["start"], given["end"], given["step"])
        labels[dim] = ties.array(np.ascontiguousarray(labels[dim][part]))
    return tuple(labels)


@rule("select")
def _select(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = list(ties.labels(given["self"]))
    ties.tie(labels.pop(given["dim"]), None)
    return tuple(labels)


@rule("unbind")
def _unbind(ties: Ties, given: dict[str, Any], result: list[Tensor]) -> Labels:
    return _select(ties, given, result[0])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split_up(ties: Ties, given: dict[str, Any], result: list[Tensor]) -> list[Labels]:
    labels, dim = list(ties.labels(given["self"])), given["dim"]
    whole = labels[dim]
    ties.tie(whole, None)
    found, start = [], 0
    for part in result:
        if whole is not None:
            end = start + part.shape[dim]
            labels[dim] = ties.array(np.ascontiguousarray(whole[start:end]))
            start = end
        found.append(tuple(labels))
    return found


@rule("constant_pad_nd")
def _pad(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = ties.labels(given["self"])
    grown = [d for d, size in enumerate(given["self"].shape) if result.shape[d] != size]
    _only_beside(ties, labels, grown, "padding")
    return labels


@rule("gather")
def _gather(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels, index = list(ties.labels(given["self"])), ties.labels(given["index"])
    dim = given["dim"] % len(labels)
    _only_beside(ties, labels, [dim], "gather")
    for d in range(len(labels)):
        if d != dim:
            ties.tie(labels[d], index[d])
            if result.shape[d] != given["self"].shape[d]:
                labels[d] = None
    return tuple(labels)


@rule("index_select")
def _index_select(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = ties.labels(given["self"])
    _only_beside(ties, labels, [given["dim"]], "index_select")
    return labels


@rule("index")
def _index(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    labels = list(ties.labels(given["self"]))
    indices = given["indices"]
    indexed = [d for d, index in enumerate(indices) if index is not None]
    _only_beside(ties, labels, indexed, "indexing")
    if len(indexed) != 1:
        _refuse(ties, "indexing with several tensors")
    labels[indexed[0] : indexed[0] + 1] = [None] * indices[indexed[0]].dim()
    return tuple(labels)


@rule("embedding")
def _embedding(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    entries, width = ties.labels(given["weight"])
    ties.tie(entries, None)
    ties.writes(width)
    return (None,) * (result.dim() - 1) + (width,)


@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
def _new(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    return (None,) * result.dim()


# --- Along a dimension ----------------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "linalg_vector_norm", "norm", "var", "std", "logsumexp")
@rule("prod", "any", "all", "var_mean")
def _reduce(ties: Ties, given: dict[str, Any], result: Any) -> Labels:
    """A removed channel is left out of the result, whether sum, mean or norm."""
    labels = ties.labels(given["self"])
    gone = _dims(given.get("dim"), len(labels))
    if given.get("keepdim"):
        return tuple(None if d in gone else nodes for d, nodes in enumerate(labels))
    return tuple(nodes for d, nodes in enumerate(labels) if d not in gone)


@rule("max", "min", "argmax", "argmin", "median")
def _extreme(ties: Ties, given: dict[str, Any], result: Any) -> Labels:
    """With a dimension they also return positions, which a removal would shift."""
    if "other" in given:
        return elementwise(ties, given, result)
    labels = ties.labels(given["self"])
    if not isinstance(result, Tensor) or result.dtype == torch.int64:
        _only_beside(ties, labels, _dims(given.get("dim"), len(labels)), "a search for an extreme")
    return _reduce(ties, given, result)


@rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    """A removed channel is left out of the normalisation."""
    return ties.labels(given["self"])


@rule("cumsum", "cumprod", "logcumsumexp", "sort", "topk", "flip", "roll")
def _ordered(ties: Ties, given: dict[str, Any], result: Any) -> Labels:
    labels = ties.labels(given["self"])
    dims = _dims(given.get("dims", given.get("dim")), len(labels))
    _only_beside(ties, labels, dims, "an operation that depends on the order")
    return labels


# --- Products -------------------------------------------------------------------------------


def _product(ties: Ties, left: Tensor, right: Tensor) -> Labels:
    """`[…, m, k] @ [… , k, n]`: the k of both are tied. Members of a batch of products stay."""
    (*batch_left, rows, inner_left) = ties.labels(left)
    (*batch_right, inner_right, columns) = ties.labels(right)
    ties.tie(inner_left, inner_right)
    for nodes in (*batch_left, *batch_right):
        ties.tie(nodes, None)
    ties.writes(rows)
    ties.writes(columns)
    inner = inner_right if inner_left is None else inner_left
    sizes = [(size, None) for size in left.shape[:-2]]
    sizes += [(left.shape[-2], rows), (left.shape[-1], inner), (right.shape[-1], columns)]
    ties.count_macs(sizes)
    return (*(None for _ in batch_left), rows, columns)


@rule("mm", "bmm")
def _mm(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    return _product(ties, given["self"], given["mat2"])


@rule("addmm", "baddbmm")
def _addmm(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    right = given.get("mat2", given.get("batch2"))
    product = _product(ties, given.get("mat1", given.get("batch1")), right)
    added: Tensor = given["self"]
    for back, nodes in enumerate(reversed(ties.labels(added)), start=1):
        if added.shape[-back] != 1:
            ties.tie(product[-back], nodes)
    return product


@rule("mv")
def _mv(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    rows, inner = ties.labels(given["self"])
    ties.tie(inner, ties.labels(given["vec"])[0])
    ties.writes(rows)
    ties.count_macs(zip(given["self"].shape, (rows, inner), strict=True))
    return (rows,)


@rule("dot")
def _dot(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    _meet(ties, [given["self"], given["tensor"]])
    return ()


@rule("convolution")
def _convolution(ties: Ties, given: dict[str, Any], result: Tensor) -> Labels:
    if given["groups"] != 1:
        _refuse(ties, f"a convolution in {given['groups']} groups")
    batch, channels, *space = ties.labels(given["input"])
    weight: Tensor = given["weight"]
    one, other, *kernel = ties.labels(weight)
    reads, writes = (one, other) if given["transposed"] else (other, one)
    ties.tie(channels, reads)
    for nodes in (batch, *space, *kernel):
        ties.tie(nodes, None)
    if given["bias"] is not None:
        ties.tie(writes, ties.labels(given["bias"])[0])
    ties.writes(writes)
    spots = given["input"] if given["transposed"] else result  # where the kernel is applied
    sizes = [(spots.shape[0], None), *((size, None) for size in spots.shape[2:])]
    sizes += zip(weight.shape, (one, other, *(None for _ in kernel)), strict=True)
    ties.count_macs(sizes)
    return (None, writes, *(None for _ in space))


# --- Normalisation and pooling --------------------------------------------------------------


@rule("native_layer_norm")
def _layer_norm(ties: Ties, given: dict[str, Any], result: Any) -> list[Labels]:
    """Statistics over the channels that are there."""
    labels = ties.labels(given["input"])
    affine = [t for t in (given["weight"], given["bias"]) if t is not None]
    normalised = labels[-len(given["normalized_shape"]) :]
    for tensor in affine:
        for nodes, own in zip(normalised, ties.labels(tensor), strict=True):
            ties.tie(nodes, own)
    if not affine and normalised[-1] is not None:
        ties.note_bare_norm(normalised[-1])
    return [labels]


@rule("_weight_norm_interface")
def _weight_norm(ties: Ties, given: dict[str, Any], result: Any) -> list[Labels]:
    """The norm is over all dimensions but one; those stay, as each of their channels is in it."""
    labels, dim = list(ties.labels(given["v"])), given["dim"]
    ties.tie(labels[dim], ties.labels(given["g"])[dim])
    for d, nodes in enumerate(labels):
        if d != dim:
            ties.tie(nodes, None)
    return [tuple(labels)]


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "_batch_norm_with_update")
def _batch_norm(ties: Ties, given: dict[str, Any], result: Any) -> list[Labels]:
    labels = ties.labels(given["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given.get(name) is not None:
            ties.tie(labels[1], ties.labels(given[name])[0])
    return [labels]


@rule("native_group_norm")
def _group_norm(ties: Ties, given: dict[str, Any], result: Any) -> list[Labels]:
    """Every group of channels has to lose equally many: the j-th ones of all go together."""
    labels = ties.labels(given["input"])
    for tensor in (given["weight"], given["bias"]):
        if tensor is not None:
            ties.tie(labels[1], ties.labels(tensor)[0])
    if labels[1] is not None:
        groups = labels[1].reshape(given["group"], -1)
        first = ties.array(np.ascontiguousarray(groups[0]))
        for other in groups[1:]:
            ties.tie(first, ties.array(np.ascontiguousarray(other)))
    return [labels]


@rule("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")
@rule("reflection_pad1d", "reflection_pad2d", "replication_pad2d", "avg_pool1d")
def _spatial(ties: Ties, given: dict[str, Any], result: Any) -> Labels:
    labels = ties.labels(given["self"])
    _only_beside(ties, labels, range(2, len(labels)), "pooling or resizing")
    return labels
