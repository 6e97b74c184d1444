"""From what is known of the units to a plan of any sparsity: cuts that a pruner may make (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from tdmpc_prune.pruning.allocation import make_plan, width_floors
from tdmpc_prune.pruning.compensation import Ranking, lift_normed, plan_by_gains
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.gains import Gains
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.structure import Structure


@dataclass(frozen=True)
class Proposal:
    """A cut that has not been made, and the basis that its units are of."""

    plan: Plan
    weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # if not the present


@dataclass(frozen=True)
class Ranked:
    """The present units, ranked, and the limits of what may go.

    Attributes:
        known: `[U]` importance per parameter of each unit, or what each adds to the others.
        structure: the groups that they are of.
        network: the counted one.
        config: floors, budgets, protection, allocation.
        dense: component → parameters before anything was cut.
    """

    known: np.ndarray | Gains
    structure: Structure
    network: nn.Module
    config: PruneConfig
    dense: Mapping[str, int]

    def propose(self, sparsity: float, strict: bool = False) -> Proposal:
        """The cut to a sparsity; unless `strict`, as far as the limits allow.

        Raises:
            UserError: the limits do not allow it, and which bind.
        """
        known, config = self.known, self.config
        if not isinstance(known, Gains):
            plan = make_plan(self.structure, known, config, sparsity, self.dense, strict)
            return Proposal(plan)
        floors = width_floors(self.structure, config)
        plan = plan_by_gains(
            self.structure,
            known.ranking,
            lift_normed(self.structure, self.network, floors),
            sparsity,
            self.dense,
            config.method,
            config.round_to,
            strict,
        )
        return Proposal(replace(plan, rotated=list(known.rotated)), known.weights)


def all_alike(structure: Structure, config: PruneConfig) -> np.ndarray | Gains:
    """Nothing known of any unit, in the form that is ranked by; for asking what is possible."""
    if not config.by_data:
        return np.zeros(sum(structure.widths.values()))
    ranking = {
        name: Ranking(np.arange(width), np.zeros(width)) for name, width in structure.widths.items()
    }
    return Gains(ranking, (), {})
