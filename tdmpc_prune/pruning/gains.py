"""Rank a network's units by data, in the basis in which few of them carry it (ours).

The layers are read once, widths that have no basis of their own are rotated into their principal
one, and all units are ranked there. The networks themselves are not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tdmpc_prune.prunable import Calibration, Computation
from tdmpc_prune.pruning.compensation import Ranking, rank, read, readers
from tdmpc_prune.pruning.rotation import bent, principal, rotate
from tdmpc_prune.pruning.structure import Structure


@dataclass(frozen=True)
class Gains:
    """What each unit adds to those before it, and the basis that the units are of."""

    ranking: dict[str, Ranking]  # group → its units in order
    rotated: tuple[str, ...]  # groups in another basis than the networks have
    weights: Mapping[str, Mapping[str, Tensor]]  # network → its weights in that basis


def rank_by_data(
    structure: Structure,
    computation: Computation,
    calibration: Calibration,
    method: str = "compensated",
    rotated: bool = True,
) -> Gains:
    """Rank the units of all groups.

    Args:
        structure: the groups of `computation`.
        computation: its networks are read, not changed.
        calibration: the data, and what of the outputs matters.
        method: "compensated" weighs by the calibration's sensitivity; "reconstruction" does not.
        rotated: in their principal basis, where a group can be rotated.

    Raises:
        UserError: there is no data, it is not finite, or it does not reach a group's readers.
    """
    turned = replace(computation, networks=copy.deepcopy(computation.networks))
    network = turned.networks[structure.counted]
    weighed = method == "compensated" and calibration.sensitivity is not None
    if not weighed:
        calibration = replace(calibration, sensitivity=None)
    readings = read(network, calibration.batches(network), calibration)
    names = []
    if rotated:
        fixed = bent(structure, computation)
        for group in structure.groups:
            read_by = readers(group, structure.counted, network, readings)
            if group.name not in fixed and read_by:
                rotation = principal(group, structure, network, readings)
                readings = rotate(group.name, rotation, structure, turned, readings)
                names.append(group.name)
    return Gains(
        ranking=rank(structure, network, readings, weighed),
        rotated=tuple(names),
        weights={name: own.state_dict() for name, own in turned.networks.items()} if names else {},
    )
