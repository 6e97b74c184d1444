"""After a cut: fit the layers that are left, in closed form, to what the whole network computes.

Most of what a removed unit says, the kept ones say together. Layer by layer, in the order of
computation, the cut network's own inputs are regressed on the whole network's outputs of the
channels that are left (ours; the family is regression-based structured pruning: CORP 2602.05243,
FLAP 2312.11983, SlimGPT 2412.18110, ZipLM 2302.04089). Linear layers and convolutions by ridge
regression on centred data, norms by one regression for each channel. A layer before a norm is
fitted to the values before it, and the norm to those after it.

Rows are summed up into float64 normal equations, batch by batch; every fifth batch is held out,
chooses the ridge, and judges: a fit that makes a layer's error there worse is not taken. Large
weights on what hardly varies may fit best, but a network that has them is lost at its first update,
when what is before them moves: of the weaker ridges, those that lead to them are not considered.

Shapes: R rows, N inputs of a layer, M outputs that are left.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn

from tdmpc_prune.errors import UserError
from tdmpc_prune.prunable import Calibration, Channels, Computation, Stage
from tdmpc_prune.pruning.layers import Norm, Product, Watch
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.structure import Structure
from tdmpc_prune.pruning.surgery import committing

_RIDGES = (1e-4, 1e-7, 1e-10, 1e-13)  # times the mean variance of the inputs
_AS_GOOD = 1.1  # the strongest ridge whose held-out error is within this factor of the least
_LOUDEST = 100.0  # times the outputs' spread, or what the weights that the cut left make of it
_ROWS = 1_024  # at once: as float64 they stay in the processor's cache
_HELD_OUT = 5  # every fifth batch, from the second on
_EXACT = 1e-16  # relative error below which there is nothing to mend
_TINY = 1e-300  # keeps 0 / 0 from being no number
_ROUNDING = 1e-13  # share of a mean square below which a variance is nothing
_SAID = 1e-9  # and above which it is something that has to be met


@dataclass(frozen=True)
class LayerFit:
    """What the refit of one layer did; errors on held-out rows, over the targets' variance."""

    layer: str
    rows: int  # that it was fitted to
    before: float  # error with the weights that the cut left
    after: float  # with those it has now
    taken: bool  # False if the fit would have made it worse, or there was nothing to mend


@dataclass(frozen=True)
class Refit:
    """What a refit did, layer by layer in the order of computation."""

    layers: tuple[LayerFit, ...]
    left: tuple[str, ...]  # layers that the cut changed and no stage fits

    def table(self) -> str:
        """As Markdown."""
        rows = [
            [
                fit.layer,
                fit.rows,
                f"{fit.before:.2g}",
                f"{fit.after:.2g}" if fit.taken else "as cut",
            ]
            for fit in self.layers
        ]
        head = ["layer", "rows", "error of the cut", "error of the fit"]
        align = ("left", "right", "right", "right")
        table = tabulate(rows, head, tablefmt="github", colalign=align, disable_numparse=True)
        return table + (f"\n\nnot fitted: {', '.join(self.left)}" if self.left else "")


def commit_refitted(
    plan: Plan,
    structure: Structure,
    computation: Computation,
    calibration: Calibration,
    optimisers: Iterable[torch.optim.Optimizer] = (),
) -> tuple[Structure, Refit]:
    """Carry out a plan and refit what it leaves, or change nothing.

    Args:
        plan: what to cut.
        structure: the groups of `computation`, as they are.
        computation: its networks are cut in place.
        calibration: data, and order.
        optimisers: of any of their parameters; they start afresh.

    Returns:
        The groups that are left, and what the refit did.

    Raises:
        UserError: the calibration fits none of the layers that are cut; see `refit`.
        SurgeryError: see `commit`.
    """
    whole = copy.deepcopy(computation.networks[structure.counted])
    optimisers = list(optimisers)
    touched, fitted = _touched(plan, structure), calibration.layers
    if not touched.intersection(fitted):
        raise UserError(
            f"the calibration fits {', '.join(fitted) or 'no layer'}, and none of these is touched "
            f"by the cut ({', '.join(sorted(touched)) or 'nothing is cut'}): give it stages with "
            f"the layers around the cut"
        )
    with committing(plan, structure, computation, optimisers) as left:
        report = refit(plan, structure, whole, computation.networks, calibration, optimisers)
        return left, report


def refit(
    plan: Plan,
    structure: Structure,
    whole: nn.Module,
    networks: Mapping[str, nn.Module],
    calibration: Calibration,
    optimisers: Iterable[torch.optim.Optimizer] = (),
) -> Refit:
    """Fit the layers of a network that has been cut; those that follow it become its copies.

    Args:
        plan: that was carried out.
        structure: the groups before the cut.
        whole: the counted network before the cut.
        networks: after the cut, the counted one first; changed in place.
        calibration: data, and order.
        optimisers: of the networks' parameters; they start afresh.

    Raises:
        UserError: the calibration's data is too little, constant or not finite. Nothing is changed
            then.
    """
    cut, *followers = networks.values()
    kept, everything = kept_channels(plan, structure, whole), all_channels(whole)
    with whole_or_restored(networks), _evaluating(whole, *networks.values()), torch.no_grad():
        batches = calibration.batches(whole)
        fits = []
        for stage in calibration.stages:
            for wave in stage.layers:
                sums = _gather(stage, wave, whole, cut, batches, kept, everything)
                fits += [_fit(layer, sums[layer]) for layer in wave]
        for follower in followers:
            _copy(cut, follower)
    for optimiser in optimisers:
        optimiser.state.clear()
    left = _touched(plan, structure).difference(calibration.layers)
    return Refit(tuple(fits), tuple(sorted(left)))


def _touched(plan: Plan, structure: Structure) -> set[str]:
    """The layers that a plan cuts."""
    return {
        layer
        for group in structure.groups
        if plan.removed.get(group.name)
        for layer in group.layers
    }


def calibration_of(
    network: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]
) -> Calibration:
    """The calibration of a network that does one thing: one stage, layers as they are first called.

    Args:
        network: the counted one.
        batches: may be iterated over again and again.
        run: gets a network and a batch.

    Raises:
        UserError: there is no batch.
    """
    batch = next(iter(batches), None)
    if batch is None:
        raise UserError("there is no data to calibrate with")
    with _evaluating(network), torch.no_grad(), Watch(network) as watch:
        run(network, batch)
    layers = tuple((name,) for name in watch.calls)
    stage = Stage(layers, lambda network, batch, channels: run(network, batch))
    return Calibration(lambda whole: batches, (stage,))


# --- Channels -----------------------------------------------------------------------------------


def written_dim(module: nn.Module) -> int:
    """The dimension of a layer's weight along which its outputs lie."""
    return 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0


def all_channels(network: nn.Module) -> dict[str, Tensor]:
    """Layer → all its output channels."""
    return {
        name: torch.arange(module.weight.shape[written_dim(module)])
        for name, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }


def kept_channels(plan: Plan, structure: Structure, whole: nn.Module) -> dict[str, Tensor]:
    """Layer → its output channels that a plan leaves."""
    kept = all_channels(whole)
    for group in structure.groups:
        removed = plan.removed.get(group.name, ())
        for s in group.slices:
            layer, _, kind = s.tensor.rpartition(".")
            if s.network != structure.counted or kind != "weight" or layer not in kept:
                continue
            if s.dim == written_dim(whole.get_submodule(layer)):
                gone = torch.from_numpy(s.index[np.isin(s.unit, removed)])
                kept[layer] = kept[layer][~torch.isin(kept[layer], gone)]
    return kept


# --- Normal equations -----------------------------------------------------------------------------


class _Sums:
    """Sums over rows of inputs `[R, N]`, targets `[R, M]` and their products, in float64.

    A norm's channels do not mix (`mixed` False): only products of a channel with itself are kept.
    """

    def __init__(self, mixed: bool):
        self.mixed = mixed
        self.rows = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        if self.rows == 0:  # sums around a first mean lose no digits to a far origin
            self.origin = [part.mean(0, dtype=torch.float64) for part in (x, y)]
        self.rows += len(x)
        parts = [x.split(_ROWS), y.split(_ROWS)]
        parts.append([None] * len(parts[0]) if weights is None else weights.split(_ROWS))
        for part in zip(*parts, strict=True):
            new = self._of(*part)
            self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new

    def _of(self, x: Tensor, y: Tensor, weights: Tensor | None) -> list[Tensor]:
        """The sums of some rows."""
        x, y = x - self.origin[0], y - self.origin[1]  # float64
        total, wx, wy = x.new_tensor(len(x)), x, y
        if weights is not None:
            w = weights.double()
            total, wx, wy = w.sum(), w[:, None] * x, w[:, None] * y
        products = (wx.T @ x, wx.T @ y) if self.mixed else ((wx * x).sum(0), (wx * y).sum(0))
        return [total, wx.sum(0), wy.sum(0), *products, (wy * y).sum(0)]

    def moments(self, centred: bool = True) -> _Moments:
        """Around the mean, or around zero for a layer that has no bias."""
        x, y, xx, xy, yy = (part / self.sums[0] for part in self.sums[1:])
        # From the sums around the origin to those around a point (dx, dy) away from it.
        dx, dy = (x, y) if centred else (-self.origin[0], -self.origin[1])
        if self.mixed:
            xx = xx - torch.outer(dx, x) - torch.outer(x, dx) + torch.outer(dx, dx)
            xy = xy - torch.outer(dx, y) - torch.outer(x, dy) + torch.outer(dx, dy)
        else:
            xx, xy = xx - 2 * dx * x + dx * dx, xy - dx * y - x * dy + dx * dy
        yy = yy - 2 * dy * y + dy * dy
        return _Moments(self.mixed, dx + self.origin[0], dy + self.origin[1], xx, xy, yy)


@dataclass(frozen=True)
class _Moments:
    """Means of products around a point, and the regression that follows from them."""

    mixed: bool
    x: Tensor  # [N] the point: the means, or zero
    y: Tensor  # [M]
    xx: Tensor  # [N, N]; [N] of a norm
    xy: Tensor  # [N, M]; [N] of a norm
    yy: Tensor  # [M]

    @property
    def spread(self) -> Tensor:
        """`[N]` of each input."""
        return self.xx.diagonal() if self.mixed else self.xx

    def solutions(self) -> Iterator[Tensor]:
        """Weights `[M, N]` (of a norm `[N]`), strongest ridge first."""
        if not self.mixed:
            yield torch.where(self.xx > 0, self.xy / self.xx.clamp(min=_TINY), 0.0)
            return
        values, vectors = torch.linalg.eigh(self.xx)
        projected = vectors.T @ self.xy
        for ridge in _RIDGES:
            strength = ridge * values.mean().clamp(min=0) + _TINY
            yield (vectors @ (projected / (values.clamp(min=0) + strength)[:, None])).T

    def bias(self, weight: Tensor) -> Tensor:
        """`[M]` that goes with a weight; zero if the point is."""
        return self.y - (weight @ self.x if self.mixed else weight * self.x)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean square of y − W x − b, summed over the outputs."""
        if self.mixed:
            squares = self.yy - 2 * (weight.T * self.xy).sum(0) + (weight @ self.xx * weight).sum(1)
        else:
            squares = self.yy - 2 * weight * self.xy + weight**2 * self.xx
        return float((squares.clamp(min=0) + (self.bias(weight) - bias) ** 2).sum())

    def loudness(self, weight: Tensor) -> float:
        """Spread of the outputs, summed, if each input moved alone, by the mean spread of all.

        So far does learning move what hardly varies on the data, too.
        """
        return float(self.spread.mean() * weight.square().sum())


@dataclass(frozen=True)
class _Gathered:
    """A layer's calls over all batches, as sums over rows."""

    call: Product | Norm  # one of them, for its weights alone
    fit: _Sums
    held: _Sums


def _gather(
    stage: Stage,
    wave: tuple[str, ...],
    whole: nn.Module,
    cut: nn.Module,
    batches: Iterable[Any],
    kept: Channels,
    everything: Channels,
) -> dict[str, _Gathered]:
    found: dict[str, _Gathered] = {}
    number = -1
    for number, batch in enumerate(batches):
        for layer, targets, call in _calls(stage, wave, whole, cut, batch, kept, everything):
            if layer not in found:
                mixed, nothing = isinstance(call, Product), call.input.new_empty(0)
                bare = replace(call, input=nothing, output=nothing)
                found[layer] = _Gathered(bare, _Sums(mixed), _Sums(mixed))
            weights = None
            if layer in stage.targets:
                targets, weights = stage.targets[layer](targets)
            sums = found[layer].held if number % _HELD_OUT == 1 else found[layer].fit
            sums.add(call.inputs(), targets, weights)
    if number < 1:
        raise UserError(
            f"the calibration has {number + 1} batches of data, and needs at least two: one to fit "
            f"layers to, one to judge the fit"
        )
    return found


def _calls(
    stage: Stage,
    wave: tuple[str, ...],
    whole: nn.Module,
    cut: nn.Module,
    batch: Any,
    kept: Channels,
    everything: Channels,
) -> Iterator[tuple[str, Tensor, Product | Norm]]:
    """Each call of a wave's layers: its targets `[R, M]`, and what the cut network did.

    Nothing is held longer than it is needed: activations are what takes memory in a refit.
    """
    with Watch(whole, wave) as wanted:
        stage.run_to(wave, whole, batch, everything)
    targets = {
        layer: [call.outputs(call.output)[:, kept[layer]] for call in calls]
        for layer, calls in wanted.calls.items()
    }
    wanted.calls.clear()
    with Watch(cut, wave) as had:
        stage.run_to(wave, cut, batch, kept)
    for layer in wave:
        own, calls = targets.pop(layer, []), had.calls.pop(layer, [])
        if not own or len(own) != len(calls):
            raise UserError(
                f"the calibration's stage for layer '{layer}' calls it {len(own)} times in the "
                f"whole network and {len(calls)} times in the cut one"
            )
        for target, call in zip(own, calls, strict=True):
            yield layer, target, call


def _fit(layer: str, found: _Gathered) -> LayerFit:
    """Give a layer its best weights, if they are better than those it has."""
    call = found.call
    _check(layer, found.fit, found.held)
    centred = call.bias is not None
    fit, held = found.fit.moments(centred), found.held.moments(centred)
    spread = found.held.moments()
    variance = float(spread.yy.sum() + _ROUNDING * spread.y.square().sum()) + _TINY
    kept = (call.matrix() if fit.mixed else call.weight).double()
    before = held.error(kept, call.bias.double() if centred else held.y) / variance
    if before <= _EXACT:
        return LayerFit(layer, found.fit.rows, before, before, False)
    strongest, *others = fit.solutions()
    loudest = _LOUDEST * max(float(fit.yy.sum()), fit.loudness(kept))
    quiet = [strongest, *(w for w in others if fit.loudness(w) <= loudest)]
    options = [(held.error(w, fit.bias(w)) / variance, w) for w in quiet]
    least = min(error for error, _ in options)
    after, weight = next(option for option in options if option[0] <= _AS_GOOD * least + _EXACT)
    if after >= before:
        return LayerFit(layer, found.fit.rows, before, before, False)
    call.weight.copy_(call.weight_of(weight) if fit.mixed else weight)
    if centred:
        call.bias.copy_(fit.bias(weight))
    return LayerFit(layer, found.fit.rows, before, after, True)


def _check(layer: str, fit: _Sums, held: _Sums) -> None:
    """Refuse data that nothing can be fitted to."""
    moments = fit.moments()
    inputs = len(moments.x)
    if not all(bool(part.isfinite().all()) for sums in (fit, held) for part in sums.sums):
        raise UserError(
            f"the activations around layer '{layer}' are not finite on the calibration's data: "
            f"the network or its data is broken"
        )
    if fit.rows < inputs:
        raise UserError(
            f"the calibration has {fit.rows} rows for layer '{layer}', which has {inputs} inputs: "
            f"it needs more data (batches, starts or images)"
        )
    nothing_said = fit.mixed and _constant(moments.x, moments.spread)
    if nothing_said and not _constant(moments.y, moments.yy, _SAID):
        raise UserError(
            f"the inputs of layer '{layer}' are constant on the calibration's data: nothing can be "
            f"fitted to them"
        )


def _constant(mean: Tensor, variance: Tensor, share: float = _ROUNDING) -> bool:
    return float(variance.mean()) <= share * float(mean.square().mean())


# --- All or nothing -----------------------------------------------------------------------------


@contextlib.contextmanager
def whole_or_restored(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put all weights back if something is raised."""
    tensors = [t for network in networks.values() for t in network.state_dict().values()]
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        raise


@contextlib.contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    """In evaluation mode meanwhile."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _copy(network: nn.Module, follower: nn.Module) -> None:
    """Give a network that follows another one its weights."""
    weights = network.state_dict()
    for name, tensor in follower.state_dict().items():
        if name in weights and weights[name].shape == tensor.shape:
            tensor.copy_(weights[name])
