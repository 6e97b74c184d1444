"""How much each unit matters, from the gradients of the losses that train it.

Sources: scores computed from gradients during training, smoothed in time, are IMPORTANCE (Sundaram
et al. 2026); no formula is published, so the formulas here are ours. Taylor and magnitude are the
usual baselines.

The energy that the Bayesian score models is that of θ·g, the gradient with respect to the logarithm
of a weight: a unit is judged by what a relative change of its weights does. The energy of g alone
says nothing of how large the weights are that a removal takes away, and chose far worse.

At every update and for every loss L, each parameter that L trains has statistics: |g|, g², |θ·g|
and θ²g². Each is divided by its mean over all parameters of L, because the scales of losses differ,
and averaged over a unit's parameters. A *density* is therefore importance per parameter, 1 on
average, comparable between groups and losses; an importance is density times parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tdmpc_prune.pruning.config import L2, PruneConfig
from tdmpc_prune.pruning.schedule import shape_at
from tdmpc_prune.pruning.structure import Structure

_STATISTICS = ("gradient", "squared gradient", "taylor", "squared taylor")
_STATISTIC_OF = {
    "gradient": "gradient",
    "fisher": "squared gradient",
    "taylor": "taylor",
    "bayesian": "squared taylor",
    "fisher_increase": "squared taylor",
}
_STRONGEST_PRIOR = 1000.0  # units that are nearly alike would be an infinitely strong prior


class Tracker:
    """Sees gradients, and keeps smoothed statistics of every unit.

    A gradient hook: called as `tracker(loss, parameters)` between a backward pass and its optimiser
    step. Units of all groups are numbered through, in the order of `structure.groups`; U is their
    number.
    """

    def __init__(
        self, structure: Structure, network: nn.Module, config: PruneConfig, seed: int
    ) -> None:
        """Start without evidence.

        Args:
            structure: the groups.
            network: the counted network.
            config: which metrics, and how they are smoothed.
            seed: of the `random` baseline.
        """
        self.config = config
        self._statistics = [
            name
            for name in _STATISTICS
            if any(_STATISTIC_OF.get(metric) == name for metric in config.tracked)
        ]
        self._evidence: dict[str, tuple[Tensor, Tensor]] = {}  # loss → current, historical [K, U]
        self._updates: dict[str, int] = {}  # loss → updates seen
        self._attach(structure, network)
        chance = torch.Generator().manual_seed(seed)
        self._random = torch.rand(self._count, generator=chance, dtype=torch.float64)

    def _attach(self, structure: Structure, network: nn.Module) -> None:
        """Where each unit's parameters are."""
        tensors = dict(network.named_parameters())
        device = next(iter(tensors.values())).device
        names = list(structure.widths)
        offsets = dict(zip(names, np.cumsum([0, *structure.widths.values()]), strict=False))
        self.groups = {
            name: slice(int(offsets[name]), int(offsets[name]) + width)
            for name, width in structure.widths.items()
        }
        self._count = sum(structure.widths.values())
        # For each parameter and dimension: the unit of each index; `_count` stands for none.
        places: dict[str, dict[int, np.ndarray]] = {name: {} for name in tensors}
        parameters = np.zeros(self._count)
        for group in structure.groups:
            for s in group.slices:
                if s.tensor not in tensors or s.network != structure.counted:
                    continue
                shape = tensors[s.tensor].shape
                none = np.full(shape[s.dim], self._count)
                index = places[s.tensor].setdefault(s.dim, none)
                index[s.index] = s.unit + offsets[group.name]
                np.add.at(parameters, index[s.index], math.prod(shape) // shape[s.dim])
        self._places = {
            name: [(dim, torch.from_numpy(index).to(device)) for dim, index in dims.items()]
            for name, dims in places.items()
        }
        self.parameters = torch.from_numpy(parameters).to(device)  # [U] per unit
        self._reciprocal = (1 / self.parameters).float()

    @torch.no_grad()
    def __call__(self, loss: str, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Take in the gradients of one loss.

        Args:
            loss: its name.
            parameters: those that it trains, by name, with `.grad` filled.
        """
        if not self._statistics:
            return
        # All parameters in a row, because many small operations would take most of the time.
        weights = torch.cat([parameter.flatten() for _, parameter in parameters])
        gradients = torch.cat([parameter.grad.flatten() for _, parameter in parameters])
        values = self._of(weights, gradients)  # [K, parameters]
        mean = values.mean(1)
        units: list[Tensor] = []
        sums: list[Tensor] = []  # [K, n]
        sizes = [parameter.numel() for _, parameter in parameters]
        for (name, parameter), own in zip(parameters, values.split(sizes, 1), strict=True):
            shaped = own.view(len(values), *parameter.shape)
            for dim, index in self._places[name]:
                units.append(index)
                sums.append(_sum_except(shaped, 0, dim + 1))
        if not units:
            return
        unit = torch.cat(units)
        found = torch.zeros(len(values), self._count + 1, device=unit.device)
        found.index_add_(1, unit, torch.cat(sums, 1))
        # A loss without any gradient says nothing of how units compare.
        density = found[:, :-1] * self._reciprocal / mean.clamp(min=1e-30)[:, None]

        if loss not in self._evidence:
            self._evidence[loss] = (torch.zeros_like(density), torch.zeros_like(density))
        self._updates[loss] = self._updates.get(loss, 0) + 1
        current, historical = self._evidence[loss]
        current.mul_(self.config.smoothing).add_(density)
        historical.mul_(self.config.memory).add_(density)

    def _of(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """The statistics `[K, N]` of N elements."""
        found = gradients.new_empty(len(self._statistics), len(gradients))
        for name, own in zip(self._statistics, found, strict=True):
            of = weights * gradients if name.endswith("taylor") else gradients
            if name.startswith("squared"):
                torch.mul(of, of, out=own)
            else:
                torch.abs(of, out=own)
        return found

    # --- What the evidence says -------------------------------------------------------------

    @property
    def has_evidence(self) -> bool:
        """Whether any gradient has been seen that the tracked metrics need."""
        return bool(self._evidence) or not self._statistics

    def densities(self, metric: str, network: nn.Module, progress: float = 1.0) -> np.ndarray:
        """Importance per parameter of every unit, `[U]`, float64.

        Current and historical evidence are combined as current^(1−w) · historical^w: high only for
        a unit that is sensitive now *and* has been. w rises along the cosine with `progress`, from
        0 (current evidence alone) to 1 (historical alone).

        Args:
            metric: one of `METRICS`, or "magnitude_l2".
            network: the counted network (for `magnitude`).
            progress: the part of the pruning schedule that lies behind.
        """
        if metric == "random":
            return self._random.numpy().copy()
        if metric in ("magnitude", L2):
            return self._magnitude(network, metric)
        statistic = self._statistics.index(_STATISTIC_OF[metric])
        current, historical = self._smoothed(statistic)
        if metric == "bayesian":
            historical = self._credible_bound(historical)
        weight = shape_at("cosine", progress)
        return current ** (1 - weight) * historical**weight

    def _smoothed(self, statistic: int) -> tuple[np.ndarray, np.ndarray]:
        """Bias-corrected moving averages (current, historical), added over the losses."""
        current, historical = np.zeros(self._count), np.zeros(self._count)
        for loss, (fast, slow) in self._evidence.items():
            updates = self._updates[loss]
            current += fast[statistic].double().cpu().numpy() / weight_sum(
                self.config.smoothing, updates
            )
            historical += slow[statistic].double().cpu().numpy() / weight_sum(
                self.config.memory, updates
            )
        return current, historical

    def _credible_bound(self, energies: np.ndarray) -> np.ndarray:
        """Upper credible bound of each unit's mean gradient energy; priors by group."""
        updates = max(self._updates.values(), default=0)
        bound = energies.copy()
        for units in self.groups.values():
            bound[units] = credible_bound(
                energies[units], self.config.memory, updates, self.config.confidence
            )
        return bound

    def _magnitude(self, network: nn.Module, metric: str) -> np.ndarray:
        """Root mean square of a unit's parameters; of `magnitude_l2` their L2 norm per parameter.

        A norm grows with the root of their number: divided by the number itself, it calls a unit of
        many parameters cheap, whatever they are. Units of one group have equally many, so that the
        two order each group alike and differ in how much they take from which.
        """
        squares = torch.zeros(self._count + 1, device=self.parameters.device)
        for name, parameter in network.named_parameters():
            for dim, index in self._places[name]:
                squares.index_add_(0, index, _sum_except(parameter.detach().square(), dim))
        squares, count = squares[:-1].double(), self.parameters
        densities = squares.sqrt() / count if metric == L2 else (squares / count).sqrt()
        return densities.cpu().numpy()

    # --- Surgery and saving -----------------------------------------------------------------

    def keep(self, kept: Mapping[str, np.ndarray], structure: Structure, network: nn.Module):
        """Go on after surgery; what stays keeps its evidence.

        Args:
            kept: group → its units that are left; groups that are not named are whole.
            structure: the groups after the cut.
            network: the counted network after the cut.
        """
        left = [
            np.arange(units.start, units.stop)[kept.get(name, slice(None))]
            for name, units in self.groups.items()
            if name in structure.widths  # a width of 1 is no group any more
        ]
        index = torch.from_numpy(np.concatenate([np.zeros(0, int), *left]))
        self._random = self._random[index]
        self._evidence = {
            loss: tuple(part[:, index.to(part.device)].clone() for part in parts)
            for loss, parts in self._evidence.items()
        }
        self._attach(structure, network)

    def forget(self) -> None:
        """Start without evidence again: the units are no longer those that were seen."""
        self._evidence, self._updates = {}, {}

    def state(self) -> dict[str, Tensor]:
        """Everything that has been gathered."""
        tensors = {"random": self._random.clone()}
        for loss, (current, historical) in self._evidence.items():
            tensors[f"current.{loss}"] = current.clone()
            tensors[f"historical.{loss}"] = historical.clone()
            tensors[f"updates.{loss}"] = torch.tensor(self._updates[loss])
        return tensors

    def load_state(
        self, tensors: Mapping[str, Tensor], structure: Structure, network: nn.Module
    ) -> None:
        """Go on from what `state` returned, with the structure of that time."""
        self._attach(structure, network)
        device = self.parameters.device
        self._random = tensors["random"].clone()
        losses = [n.removeprefix("updates.") for n in tensors if n.startswith("updates.")]
        self._updates = {loss: int(tensors[f"updates.{loss}"]) for loss in losses}
        self._evidence = {
            loss: tuple(
                tensors[f"{part}.{loss}"].to(device, copy=True)
                for part in ("current", "historical")
            )
            for loss in losses
        }


def _sum_except(values: Tensor, *dims: int) -> Tensor:
    """Sum over all dimensions but `dims`."""
    others = [d for d in range(values.dim()) if d not in dims]
    return values.sum(others) if others else values


def weight_sum(decay: float, updates: int) -> float:
    """Σ decay^k over the updates: what a decayed sum is divided by to be an average."""
    return (1 - decay**updates) / (1 - decay)


def posterior(
    energies: np.ndarray, decay: float, updates: int, prior: tuple[float, float]
) -> tuple[float, np.ndarray]:
    """The Gamma posterior of each unit's rate, after `updates` observations (ours).

    Assumed: a unit's gradient energies e_t (mean (θ·g)² over its parameters, relative to the mean
    over all parameters of the loss) are independent draws from an exponential distribution of
    rate λ; λ ~ Gamma(α₀, β₀) over the units of a group. With the forgetting factor γ,
    α ← γα + (1−γ)α₀ + 1 and β ← γβ + (1−γ)β₀ + e_t, from (α₀, β₀). Both are linear, so that
    α = α₀ + Σγ^k and β = β₀ + Σγ^k e: the data can be kept apart from the prior, which is fitted
    anew at each reading.

    Args:
        energies: `[n]` bias-corrected moving averages, Σγ^k e / Σγ^k.
        decay: γ.
        updates: observations so far.
        prior: (α₀, β₀).

    Returns:
        α, the same for all, and β `[n]`.
    """
    weight = weight_sum(decay, updates)
    return prior[0] + weight, prior[1] + weight * energies


def fit_prior(energies: np.ndarray, decay: float, updates: int) -> tuple[float, float]:
    """Empirical Bayes: (α₀, β₀) by the moments of a group's own population (ours).

    Under the model the units' means 1/λ have mean μ = β₀/(α₀−1) and variance μ²/(α₀−2); an average
    of n observations adds their sampling variance E[1/λ²]/n. The sampled variance is corrected for
    it before α₀ is solved for, and α₀ is bounded: units that are alike would make it infinite.
    """
    mean = energies.mean()
    if mean == 0:  # a loss that does not reach the group: nothing tells its units apart
        return 2 + _STRONGEST_PRIOR, 0.0
    squares = (1 - decay ** (2 * updates)) / (1 - decay**2)
    n = weight_sum(decay, updates) ** 2 / squares  # effective observations
    relative = (energies / mean).var()
    spread = (relative - 1 / n) / (1 + 1 / n)  # 1 / (α₀ − 2)
    alpha = 2 + 1 / max(spread, 1 / _STRONGEST_PRIOR)
    return alpha, (alpha - 1) * mean


def credible_bound(
    energies: np.ndarray, decay: float, updates: int, confidence: float
) -> np.ndarray:
    """Posterior mean energy plus `confidence` standard deviations, `[n]` (ours).

    The energy's mean 1/λ is inverse-Gamma: m = β/(α−1), s = m/√(α−2).
    """
    alpha, beta = posterior(energies, decay, updates, fit_prior(energies, decay, updates))
    mean = beta / (alpha - 1)
    return mean + confidence * mean / math.sqrt(alpha - 2)
