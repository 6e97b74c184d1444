"""Turn the basis of a width that is written and read linearly, so that few units carry it (ours).

Between layers that only multiply, a width has no basis of its own: with any rotation R, writers
W ← R W, b ← R b and readers W ← W Rᵀ compute the same (after SliceGPT, Ashkboos et al. 2024). In
the basis chosen here the units are ordered by what their readers' outputs feel of them, and do not
say the same thing twice; so a cut costs far less than in the basis that training happened to find.

R is orthonormal, so that R on every slice of the group does both: along a writer's rows it is R W,
along a reader's columns W Rᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Computation
from tdmpc_prune.pruning.compensation import Reading, readers, root
from tdmpc_prune.pruning.refit import written_dim
from tdmpc_prune.pruning.structure import Group, Structure
from tdmpc_prune.pruning.ties import Running, Ties
from tdmpc_prune.pruning.tracing import Watcher, watching, without_data

# Operations that commute with a rotation of the channels they pass on.
_LINEAR = {"mm", "addmm", "bmm", "baddbmm", "mv", "convolution"}
_SHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "t", "transpose"}
_SHAPES |= {"unsqueeze", "squeeze", "expand", "repeat", "cat", "stack", "slice", "select", "unbind"}
_SHAPES |= {"split", "split_with_sizes", "gather", "index_select", "index", "clone", "copy"}
_SHAPES |= {"_to_copy", "detach", "alias", "lift_fresh", "zeros_like", "empty_like", "new_zeros"}
_SUMS = {"add", "sub", "neg", "_foreach_lerp", "lerp"}  # of tensors that both carry the channels
_SCALES = {"mul", "div"}  # by something that carries none


def bent(structure: Structure, computation: Computation) -> dict[str, str]:
    """Group → why it cannot be rotated; groups that can are not named.

    What is watched is `cost` if the computation has one, since a loss need not commute.
    """
    networks = without_data(computation.networks)
    running = Running(networks)
    ties = Ties(networks, running)
    watcher = _LinearityWatcher(running, ties)
    with watching(watcher):
        (computation.cost or computation.run)(networks)
    place = {(axis.network, axis.tensor, axis.dim): axis.nodes for axis in ties.axes}
    counted = computation.networks[structure.counted]
    found = {}
    for group in structure.groups:
        reason = _no_single_basis(group, structure.counted, counted)
        if reason is None:
            own = set()
            for s in group.slices:
                own.update(place[s.network, s.tensor, s.dim][s.index].tolist())
            reason = next(
                (why for nodes, why in watcher.bends if own.intersection(nodes.tolist())), None
            )
        if reason is not None:
            found[group.name] = reason
    return found


def rotate(
    group: str,
    rotation: Tensor,
    structure: Structure,
    computation: Computation,
    readings: Mapping[str, Reading] | None = None,
) -> dict[str, Reading]:
    """Rotate a group in all networks that have it; what they compute does not change.

    Args:
        group: its name.
        rotation: `[U, U]`, orthonormal rows: the new units in terms of the old.
        structure: the groups.
        computation: its networks are changed in place.
        readings: of the layers, before.

    Returns:
        The readings after it.

    Raises:
        UserError: the group is not written and read linearly, or the rotation is none.
    """
    own = next(g for g in structure.groups if g.name == group)
    reasons = bent(structure, computation)
    if group in reasons:
        raise UserError(f"group '{group}' cannot be rotated: {reasons[group]}")
    rotation = rotation.double()
    identity = torch.eye(own.width, dtype=torch.float64)
    if rotation.shape != identity.shape or not torch.allclose(
        rotation @ rotation.T, identity, atol=1e-8
    ):
        raise UserError(f"the matrix that group '{group}' is to be rotated by is no rotation")
    found = dict(readings or {})
    with torch.no_grad():
        for s in own.slices:
            index = torch.from_numpy(s.index[np.argsort(s.unit)])
            network = computation.networks[s.network]
            tensor = network.get_parameter(s.tensor)
            tensor.data = _turn(tensor, rotation, s.dim, index)
            layer, _, kind = s.tensor.rpartition(".")
            if s.network != structure.counted or kind != "weight" or layer not in found:
                continue
            if s.dim == written_dim(network.get_submodule(layer)):
                gradient = _turn_both(found[layer].gradient, rotation, index)
                weight = _turn(found[layer].weight, rotation, 0, index)
                found[layer] = replace(found[layer], gradient=gradient, weight=weight)
            else:
                found[layer] = replace(
                    found[layer],
                    weight=_turn(found[layer].weight, rotation, 1, index),
                    covariance=_turn_both(found[layer].covariance, rotation, index),
                    weighed=_turn_both(found[layer].weighed, rotation, index),
                )
    return found


def principal(group: Group, structure: Structure, network: nn.Module, readings) -> Tensor:
    """The rotation `[U, U]` in which a group's units are what its readers feel most, in order.

    With H = Σ Wᵀ G W over the readers and C the covariance of the group's values, the rows are the
    right singular vectors of H^½ C^½, whitened by C^-½ and made orthonormal one after another.
    """
    feels, values, total = 0.0, 0.0, 0.0
    for reading, inputs in readers(group, structure.counted, network, readings):
        index = inputs[:, 0]
        weight = reading.weight[:, index]
        feels = feels + weight.T @ reading.gradient @ weight
        trace = float(reading.gradient.trace())
        values = values + trace * reading.covariance[index][:, index]
        total += trace
    values = values / max(total, 1e-300)
    spread, basis = torch.linalg.eigh(values)
    spread = spread.clamp(min=1e-9 * float(spread.max()))
    half, inverse = basis * spread.sqrt() @ basis.T, basis / spread.sqrt() @ basis.T
    _, _, directions = torch.linalg.svd(root(feels) @ half)
    ordered, signs = torch.linalg.qr((directions @ inverse).T)  # Gram-Schmidt
    return (ordered * signs.diagonal().sign()).T


def _turn(tensor: Tensor, rotation: Tensor, dim: int, index: Tensor) -> Tensor:
    """`rotation` on the channels `index` of a dimension."""
    moved = tensor.double().movedim(dim, 0).clone()
    moved[index] = torch.tensordot(rotation, moved[index], 1)
    return moved.movedim(0, dim).to(tensor.dtype).contiguous()


def _turn_both(matrix: Tensor, rotation: Tensor, index: Tensor) -> Tensor:
    return _turn(_turn(matrix, rotation, 0, index), rotation, 1, index)


def _no_single_basis(group: Group, counted: str, network: nn.Module) -> str | None:
    """Why a group's places do not let it be rotated."""
    for s in group.slices:
        if len(s.index) != group.width or len(np.unique(s.unit)) != group.width:
            return f"a unit has several channels in '{s.tensor}'"
        layer, _, kind = s.tensor.rpartition(".")
        if s.network != counted:
            continue
        module = network.get_submodule(layer)
        if kind not in ("weight", "bias") or not isinstance(
            module, (nn.Linear, nn.Conv1d, nn.Conv2d)
        ):
            return f"'{s.tensor}' is of no linear layer"
    return None


class _LinearityWatcher(Watcher):
    """Takes down which channels meet an operation that does not commute with a rotation."""

    def __init__(self, running: Running, ties: Ties):
        super().__init__(running, ties)
        self.ties = ties
        self.bends: list[tuple[np.ndarray, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in _LINEAR or name in _SHAPES:
            return result
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        met = [
            {id(nodes): nodes for nodes in self.ties.labels(t) if nodes is not None}
            for t in tensors
        ]
        if name in _SUMS:
            plain = not all(met) or len(tensors) < (1 if name == "neg" else 2)
        elif name in _SCALES:
            plain = sum(map(bool, met)) > 1
        else:
            plain = True
        if plain:
            for nodes in {key: n for own in met for key, n in own.items()}.values():
                self.bends.append(
                    (nodes, f"'{name}' in {self.running.place()} depends on its basis")
                )
        return result
