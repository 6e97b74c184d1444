"""Which units can be spared: those whose say the kept ones can take over (ours).

The order inside a group is a pivoted elimination. With x the group's values as a layer reads them,
C their covariance and W the layer's weights on them, T = C Wᵀ holds what each unit alone could
predict of what the layer makes of the group. The unit that predicts most is taken, what it predicts
is taken off T and C (Schur complement), and so on: a unit's *gain* is what it adds to those before
it, an expected decrease of the layer's squared output error once the layer is refitted.

*Compensated*: outputs weighed by G, the second moment of the gradient of what the network is used
for (the calibration's `sensitivity`), and rows of inputs by the gradient's square (after K-FAC).
Gains are then of one unit in all groups, and compared as they are. *Reconstruction*: every output
matters alike, and gains are shares of what the group says.

Shapes: U units, N inputs and M outputs of a layer, B inputs of a layer for each unit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Calibration
from tdmpc_prune.pruning.layers import Product, Watch
from tdmpc_prune.pruning.plan import Plan, plan_of
from tdmpc_prune.pruning.refit import all_channels, written_dim
from tdmpc_prune.pruning.structure import Group, Structure

_LEAST_NORMED = 8  # units that a group with a LayerNorm keeps: over 2 or 3 it says almost nothing
_EXPLAINED = 1e-9  # share of its variance below which the others say all that a unit says


@dataclass(frozen=True)
class Reading:
    """A layer's weights, and moments of what runs through it; float64."""

    weight: Tensor  # [M, N]
    kernel: int  # inputs for each channel
    covariance: Tensor  # [N, N] of the inputs
    weighed: Tensor  # [N, N] the same, rows weighed by the squared gradient of the outputs
    gradient: Tensor  # [M, M] second moment of the gradient of the outputs, summed over calls


def read(
    network: nn.Module, batches: Iterable[Any], calibration: Calibration
) -> dict[str, Reading]:
    """Moments of all layers that the calibration runs, by layer.

    Without a `sensitivity` every output matters alike: G is the identity.

    Raises:
        UserError: there is no data, or it is not finite.
    """
    sums: dict[str, list[Tensor]] = {}
    layers: dict[str, tuple[Tensor, int]] = {}  # weight and kernel
    with _differentiable(network):
        for batch in batches:
            for layer, matrix, kernel, new in _read_batch(network, batch, calibration):
                layers[layer] = matrix, kernel
                old = sums.get(layer)
                sums[layer] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
    if not sums:
        raise UserError("there is no data to calibrate with")
    return {layer: _reading(layer, *layers[layer], own) for layer, own in sums.items()}


@contextlib.contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """With gradients meanwhile: of the outputs of frozen layers, too."""
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _read_batch(
    network: nn.Module, batch: Any, calibration: Calibration
) -> list[tuple[str, Tensor, int, list[Tensor]]]:
    """Each call's layer, its weight and kernel, and its sums; nothing else of the batch is kept."""
    graded = calibration.sensitivity is not None
    with Watch(network) as watch, torch.set_grad_enabled(graded):
        if graded:
            total = calibration.sensitivity(network, batch)
        else:
            everything = all_channels(network)
            for stage in calibration.stages:
                stage.run(network, batch, everything)
    made = [
        (layer, call)
        for layer, calls in watch.calls.items()
        for call in calls
        if isinstance(call, Product)
    ]
    gradients: Sequence[Tensor | None] = [None] * len(made)
    if graded:
        outputs = [call.output for _, call in made]
        gradients = torch.autograd.grad(total, outputs, allow_unused=True)
    with torch.no_grad():
        return [
            (layer, call.matrix(), call.kernel, _sums(call, gradient, graded))
            for (layer, call), gradient in zip(made, gradients, strict=True)
        ]


def _sums(call: Product, gradient: Tensor | None, graded: bool) -> list[Tensor]:
    x = call.inputs()
    if not graded:
        weights, outer = x.new_ones(len(x)), torch.eye(len(call.matrix()), dtype=x.dtype)
    elif gradient is None:
        weights, outer = x.new_zeros(len(x)), x.new_zeros(2 * (len(call.matrix()),))
    else:
        g = call.outputs(gradient)
        weights, outer = g.square().sum(1), g.T @ g
    wx = weights[:, None] * x
    parts = [x.new_tensor(len(x)), x.sum(0), x.T @ x, weights.sum(), wx.sum(0), wx.T @ x, outer]
    return [part.double() for part in parts]


def _reading(layer: str, matrix: Tensor, kernel: int, sums: list[Tensor]) -> Reading:
    rows, x, xx, weight, wx, wxx, outer = sums
    if not all(bool(part.isfinite().all()) for part in sums):
        raise UserError(
            f"the activations or gradients around layer '{layer}' are not finite on the "
            f"calibration's data: the network or its data is broken"
        )
    weight = weight.clamp(min=torch.finfo(torch.float64).tiny)
    mean, weighed = x / rows, wx / weight
    return Reading(
        weight=matrix.detach().double(),
        kernel=kernel,
        covariance=xx / rows - torch.outer(mean, mean),
        weighed=wxx / weight - torch.outer(weighed, weighed),
        gradient=outer,
    )


# --- The order inside each group ------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """A group's units from the most expendable to the most needed, and what each adds."""

    order: np.ndarray  # [U]
    gains: np.ndarray  # [U] ascending, in the order of `order`


def rank(
    structure: Structure,
    network: nn.Module,
    readings: Mapping[str, Reading],
    compensated: bool = True,
) -> dict[str, Ranking]:
    """Order the units of every group.

    Args:
        structure: the groups.
        network: the counted network.
        readings: of all layers, from `read`.
        compensated: weigh outputs and rows by gradients; or else reconstruct all outputs alike.

    Raises:
        UserError: no layer with readings reads a group.
    """
    return {
        group.name: _rank(group, structure.counted, network, readings, compensated)
        for group in structure.groups
    }


def readers(
    group: Group, counted: str, network: nn.Module, readings: Mapping[str, Reading]
) -> list[tuple[Reading, Tensor]]:
    """The layers that read a group: their readings, and the inputs of each unit `[U, B]`."""
    found = []
    for s in group.slices:
        layer, _, kind = s.tensor.rpartition(".")
        if s.network != counted or kind != "weight" or layer not in readings:
            continue
        module = network.get_submodule(layer)
        if module.weight.dim() < 2 or s.dim == written_dim(module):
            continue
        channels = torch.from_numpy(s.index[np.argsort(s.unit, kind="stable")])
        kernel = readings[layer].kernel
        inputs = channels[:, None] * kernel + torch.arange(kernel)
        found.append((readings[layer], inputs.reshape(group.width, -1)))
    return found


def _rank(group, counted, network, readings, compensated) -> Ranking:
    terms, said = [], 0.0
    for reading, inputs in readers(group, counted, network, readings):
        flat = inputs.reshape(-1)
        covariance = (reading.weighed if compensated else reading.covariance)[flat][:, flat]
        weight = reading.weight[:, flat]
        if compensated:
            weight = root(reading.gradient) @ weight
        product = covariance @ weight.T
        said += float((product * weight.T).sum())
        terms.append((covariance, product, inputs.shape[1]))
    if not terms:
        raise UserError(
            f"nothing is known of a layer that reads group '{group.name}': the calibration has to "
            f"run it"
        )
    chosen, gains = _eliminate(terms, group.width)
    if not compensated and said > 0:  # shares of what the group says
        gains = [gain / said for gain in gains]
    gains = np.minimum.accumulate(gains)
    return Ranking(np.array(chosen)[::-1].copy(), gains[::-1].copy())


def _eliminate(
    terms: list[tuple[Tensor, Tensor, int]], width: int
) -> tuple[list[int], list[float]]:
    """Units in the order in which they are taken, and what each adds.

    Args:
        terms: for each reader, C `[U·B, U·B]`, T `[U·B, M]` and B.
        width: U.
    """
    blocks = [(c.reshape(width, b, width, b), t.reshape(width, b, -1)) for c, t, b in terms]
    places = torch.arange(width)
    floors = [_EXPLAINED * c[places, :, places].diagonal(dim1=1, dim2=2) for c, _ in blocks]
    left = torch.ones(width, dtype=torch.bool)
    chosen, gains = [], []
    for _ in range(width):
        inverses = [
            _inverse(c[places, :, places], floor)
            for (c, _), floor in zip(blocks, floors, strict=True)
        ]
        gain = sum(
            (t * (inverse @ t)).sum((1, 2))
            for (_, t), inverse in zip(blocks, inverses, strict=True)
        )
        unit = int(torch.where(left, gain, -torch.inf).argmax())
        chosen.append(unit)
        gains.append(float(gain[unit].clamp(min=0)))
        left[unit] = False
        for number, ((c, t), inverse) in enumerate(zip(blocks, inverses, strict=True)):
            column = c[:, :, unit] @ inverse[unit]  # [U, B, B]
            t = t - column @ t[unit]
            c = c - torch.einsum("uij,jvk->uivk", column, c[unit])
            blocks[number] = (c, t)
    return chosen, gains


def _inverse(blocks: Tensor, floors: Tensor) -> Tensor:
    """Inverses of symmetric `[U, B, B]`; what lies below `floors` `[U, B]` counts as nothing."""
    if blocks.shape[1] == 1:
        return torch.where(blocks > floors[..., None], 1 / blocks, 0.0)
    values, vectors = torch.linalg.eigh(blocks)
    inverse = torch.where(values > floors.amax(1, keepdim=True), 1 / values, 0.0)
    return vectors * inverse[:, None] @ vectors.mT


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


# --- How much from each group ------------------------------------------------------------------


def densities(structure: Structure, ranking: Mapping[str, Ranking]) -> np.ndarray:
    """`[U]` gain per parameter of each unit, all groups in their order: importance densities."""
    found = []
    for group in structure.groups:
        own = np.empty(group.width)
        own[ranking[group.name].order] = ranking[group.name].gains
        found.append(own / structure.per_unit(group.name)[0])
    return np.concatenate(found)


def lift_normed(structure: Structure, network: nn.Module, floors: Mapping[str, int]):
    """Floors, raised for the groups that a LayerNorm normalises over."""
    normed = {
        group.name
        for group in structure.groups
        for layer in group.layers
        if isinstance(network.get_submodule(layer), (nn.LayerNorm, nn.RMSNorm))
    }
    widths = structure.widths
    return {
        name: max(floor, min(_LEAST_NORMED, widths[name])) if name in normed else floor
        for name, floor in floors.items()
    }


def plan_by_gains(
    structure: Structure,
    ranking: Mapping[str, Ranking],
    floors: Mapping[str, int],
    sparsity: float,
    dense: Mapping[str, int],
    method: str = "compensated",
    round_to: int = 1,
    strict: bool = True,
) -> Plan:
    """Take, again and again, the units whose gain for each parameter that they free is least.

    Parameters are counted at the widths of that moment.

    Args:
        structure: the present groups.
        ranking: group → its units in order.
        floors: group → units that stay at least.
        sparsity: fraction of the dense parameters that is to be gone.
        dense: component → parameters of the dense network.
        method: name of what ranked the units.
        round_to: widths that are cut become a multiple of this.
        strict: False cuts as far as the floors allow.

    Raises:
        UserError: the floors do not allow it.
    """
    widths = structure.widths
    allowed = (1 - sparsity) * sum(dense.values())
    sizes = {
        name: [
            size
            for size in structure.parameter_sizes
            if any(part == name for _, parts in size.factors for part, _ in parts)
        ]
        for name in widths
    }
    left = sum(structure.parameters().values())
    while left > allowed:
        best = None
        for name, width in widths.items():
            narrower = (width - 1) // round_to * round_to
            if narrower < max(floors[name], 1):
                continue
            fewer = widths | {name: narrower}
            freed = sum(size.at(widths) - size.at(fewer) for size in sizes[name])
            gone = structure.widths[name] - width
            gain = ranking[name].gains[gone : gone + width - narrower].sum()
            if best is None or gain / freed < best[0]:
                best = (gain / freed, name, narrower, freed)
        if best is None and not strict:
            break
        if best is None:
            raise UserError(
                f"sparsity {sparsity:g} cannot be reached: {left} parameters are left with every "
                f"width at its floor ({', '.join(f'{n} ≥ {w}' for n, w in floors.items())}), "
                f"{int(allowed)} would have to be; lower prune.sparsity or the floors"
            )
        _, name, narrower, freed = best
        widths = widths | {name: narrower}
        left -= freed
    order = {name: own.order for name, own in ranking.items()}
    return plan_of(structure, order, widths, (method, "gains"), sparsity, dense)
