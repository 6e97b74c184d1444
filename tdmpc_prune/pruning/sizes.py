"""Modules repeat the sizes of their weights in attributes: what those have to say (ours)."""

from __future__ import annotations

from typing import Any

from torch import nn

# Module → attributes that repeat the size of its weight, and along which dimension.
_SIZES: list[tuple[type[nn.Module], dict[str, int]]] = [
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (nn.modules.conv._ConvTransposeNd, {"in_channels": 0, "out_channels": 1}),
    (nn.modules.conv._ConvNd, {"out_channels": 0, "in_channels": 1}),
    (nn.modules.batchnorm._NormBase, {"num_features": 0}),
    (nn.GroupNorm, {"num_channels": 0}),
    (nn.Embedding, {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.PReLU, {"num_parameters": 0}),
    (nn.RNNBase, {"input_size": 1}),  # their state's width stays
    (nn.RNNCellBase, {"input_size": 1}),
]


def attribute_sizes(module: nn.Module) -> dict[str, Any]:
    """Attribute → what it has to be for the module's weight as it is now."""
    # Under the old weight_norm `weight` is what the last forward left behind.
    weight = getattr(module, "weight_v", getattr(module, "weight", None))
    if weight is None and isinstance(module, nn.modules.batchnorm._NormBase):
        weight = module.running_mean
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        weight = getattr(module, "weight_ih_l0", getattr(module, "weight_ih", None))
    if weight is None:
        return {}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": tuple(weight.shape)}
    for kind, attributes in _SIZES:
        if isinstance(module, kind):
            return {name: weight.shape[dim] for name, dim in attributes.items()}
    return {}
