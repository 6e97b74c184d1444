"""Networks whose units are masked softly: what lies between the whole one and the one that is cut.

All parameters of a unit are multiplied by its mask, and norms weigh their channels by it (ours).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.structure import Structure

Objective = Callable[[dict[str, nn.Module]], Tensor]  # networks → the loss of one batch


class _Holder(nn.Module):
    """Networks as one module, so that all their parameters can be replaced for one call."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, objective: Objective) -> Tensor:
        return objective(dict(self.networks))


class _MaskedNorms(TorchFunctionMode):
    """LayerNorm and GroupNorm whose statistics weigh each channel by its mask."""

    def __init__(self, channel_masks: dict[int, Tensor]):
        super().__init__()
        self._masks = channel_masks  # id of the norm's (masked) weight → mask of its channels
        self.bare: Tensor | None = None  # the same for the norm that runs next, without weights

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.group_norm:
            return self._group_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _mask(self, weight: Tensor | None) -> Tensor | None:
        mask, self.bare = self.bare, None
        return mask if weight is None else self._masks.get(id(weight))

    def _layer_norm(self, x, shape, weight=None, bias=None, eps=1e-5) -> Tensor:
        mask = self._mask(weight)
        if mask is None:
            return F.layer_norm(x, shape, weight, bias, eps)
        dims = tuple(range(-len(shape), 0))
        normal = _weighted(x, mask, dims, eps)
        return normal if weight is None else normal * weight + bias

    def _group_norm(self, x, groups, weight=None, bias=None, eps=1e-5) -> Tensor:
        mask = self._mask(weight)
        if mask is None:
            return F.group_norm(x, groups, weight, bias, eps)
        split = x.reshape(len(x), groups, -1, *x.shape[2:])
        ones = (1,) * (x.dim() - 2)
        dims = tuple(range(2, split.dim()))
        normal = _weighted(split, mask.reshape(groups, -1, *ones), dims, eps).reshape(x.shape)
        return normal * weight.reshape(-1, *ones) + bias.reshape(-1, *ones)


def _weighted(x: Tensor, mask: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """`x` normalised by the mean and variance of its channels, weighed by their masks."""
    weights = mask.expand_as(x)
    total = weights.sum(dims, keepdim=True)
    mean = (weights * x).sum(dims, keepdim=True) / total
    variance = (weights * (x - mean).square()).sum(dims, keepdim=True) / total
    return (x - mean) / torch.sqrt(variance + eps)


def masked(
    objective: Objective,
    networks: Mapping[str, nn.Module],
    structure: Structure,
    masks: Mapping[str, Tensor],
) -> Tensor:
    """What `objective` returns of the networks with their units masked.

    Args:
        objective: gets the networks by name.
        networks: those that the structure was found in.
        structure: their groups.
        masks: group → `[width]`.

    Raises:
        UserError: a norm without weights lies on a prunable width.
    """
    parameters = {
        (network, name): parameter
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
    }
    scales: dict[tuple[str, str], dict[int, Tensor]] = {}
    for group in structure.groups:
        mask = masks[group.name]
        for part in group.slices:
            place = (part.network, part.tensor)
            if place not in parameters:
                continue  # a buffer: what it describes is multiplied by the masked weight
            dims = scales.setdefault(place, {})
            size = parameters[place].shape[part.dim]
            before = dims.get(part.dim, torch.ones(size))
            index = torch.from_numpy(part.index)
            own = mask[torch.from_numpy(part.unit)].to(before.dtype)
            dims[part.dim] = before.index_copy(0, index, own)
    replaced, channel_masks = {}, {}
    for place, dims in scales.items():
        value = parameters[place]
        for dim, scale in dims.items():
            shape = [-1 if d == dim else 1 for d in range(value.dim())]
            value = value * scale.to(value.dtype).reshape(shape)
        replaced[f"networks.{place[0]}.{place[1]}"] = value
        if value.dim() == 1:
            channel_masks[id(value)] = dims[0].to(value.dtype)
    norms = _MaskedNorms(channel_masks)
    with norms, _bare_norms_told(norms, networks, structure, masks):
        return torch.func.functional_call(_Holder(networks), replaced, (objective,))


@contextlib.contextmanager
def _bare_norms_told(
    norms: _MaskedNorms,
    networks: Mapping[str, nn.Module],
    structure: Structure,
    masks: Mapping[str, Tensor],
) -> Iterator[None]:
    """Before a LayerNorm without weights runs, hand over the mask of its channels."""
    with contextlib.ExitStack() as stack:
        for network, path, (fixed, parts) in structure.bare_norms:
            if fixed or len(parts) != 1 or parts[0][1] != 1:
                raise UserError(
                    f"norm '{path}' of '{network}' has no weights, and its channels are not one "
                    f"to a unit: it cannot be masked softly; give it weights"
                )
            norm, mask = networks[network].get_submodule(path), masks[parts[0][0]]
            hook = norm.register_forward_pre_hook(
                lambda module, inputs, mask=mask: setattr(norms, "bare", mask.to(inputs[0].dtype))
            )
            stack.callback(hook.remove)
        yield
