"""Carry out a plan: cut networks and optimisers together, or change nothing (ours).

Parameters stay the same objects with smaller data, so that optimisers, hooks and whoever else holds
them need not be told. After the cut the computation is traced again: if it does not run, or ties
its channels in another way, the cut is undone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc_prune.pruning.groups import Structure, find_groups, size_of
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.tracing import Computation

# Module → attributes that repeat the size of its weight, and along which dimension.
_SIZES: list[tuple[type[nn.Module], dict[str, int]]] = [
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (nn.modules.conv._ConvTransposeNd, {"in_channels": 0, "out_channels": 1}),
    (nn.modules.conv._ConvNd, {"out_channels": 0, "in_channels": 1}),
    (nn.modules.batchnorm._NormBase, {"num_features": 0}),
    (nn.GroupNorm, {"num_channels": 0}),
    (nn.Embedding, {"num_embeddings": 0, "embedding_dim": 1}),
]


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
    """Cut all networks of the computation, and the optimisers' moments.

    Args:
        plan: what to cut.
        structure: the groups of `computation`, as they are.
        computation: its networks are cut in place.
        optimisers: of any of their parameters.

    Returns:
        The groups that are left.

    Raises:
        UserError: the plan does not fit the structure.
        SurgeryError: what is left is not what was planned. Nothing is changed then.
    """
    plan.check(structure)
    optimisers = list(optimisers)
    cut = _Cut()
    try:
        dropped = _dropped_indices(plan, structure)
        owners = _owners(computation.networks)
        for (network, name), dims in dropped.items():
            _, tensor = owners[network, name]
            full = tensor.data
            cut.replace(tensor, _select(full, dims))
            for optimiser in optimisers:
                state = optimiser.state.get(tensor, {})
                for key, moment in state.items():
                    if isinstance(moment, Tensor) and moment.shape == full.shape:
                        cut.put(state, key, _select(moment, dims))
        changed = {id(owners[place][1]) for place in dropped}
        for module, tensor in owners.values():  # weights may be shared
            if id(tensor) in changed:
                _set_sizes(cut, module)
        after = plan.widths_after
        for network, path, width in structure.bare_norms:
            norm = computation.networks[network].get_submodule(path)
            shape = (*norm.normalized_shape[:-1], size_of(width, after))
            cut.put(norm.__dict__, "normalized_shape", shape)
        left = find_groups(computation)
        # One channel that is left alone is a width of 1, and no group any more.
        same = all(left.widths.get(name, 1) == width for name, width in after.items())
        if not same or not set(left.widths) <= set(after):
            raise SurgeryError(f"the cut left the widths {left.widths} instead of {after}")
    except BaseException as error:
        cut.undo()
        if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, SurgeryError):
            raise SurgeryError(f"the cut network does not run: {error}") from error
        raise
    return left


class _Cut:
    """What has been changed so far, and how to take it back."""

    def __init__(self) -> None:
        self._before: list = []

    def replace(self, tensor: Tensor, data: Tensor) -> None:
        """Give a parameter or buffer other data; its gradient is of the old shape, and goes."""
        self._before.append((tensor, tensor.data, tensor.grad))
        tensor.grad = None
        tensor.data = data

    def put(self, place: dict, key: str, value) -> None:
        self._before.append((place, key, place[key]))
        place[key] = value

    def undo(self) -> None:
        for first, second, third in reversed(self._before):
            if isinstance(first, dict):
                first[second] = third
            else:
                first.data = second
                first.grad = third


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


def _owners(networks: dict[str, nn.Module]) -> dict[tuple[str, str], tuple[nn.Module, Tensor]]:
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


def _set_sizes(cut: _Cut, module: nn.Module) -> None:
    """Make a module's attributes say what its weight's shape says."""
    weight = getattr(module, "weight", None)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        cut.put(module.__dict__, "normalized_shape", tuple(weight.shape))
        return
    if weight is None and isinstance(module, nn.modules.batchnorm._NormBase):
        weight = module.running_mean
    for kind, attributes in _SIZES:
        if isinstance(module, kind) and weight is not None:
            for attribute, dim in attributes.items():
                cut.put(module.__dict__, attribute, weight.shape[dim])
            return
