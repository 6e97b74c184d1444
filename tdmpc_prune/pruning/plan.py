"""Which units to cut: a plan is a value that can be printed, saved, and carried out later (ours).

Who chooses the units is not its business: `allocation` and `coefficients` make plans, `surgery`
carries them out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from tabulate import tabulate

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.structure import Structure

FORMAT = "tdmpc_prune plan"


@dataclass(frozen=True)
class Plan:
    """A cut that has not been made. Components and groups by name."""

    method: str
    allocation: str
    sparsity: float  # asked for: fraction of the dense parameters
    dense_parameters: int
    widths: dict[str, int]  # group → units before
    removed: dict[str, list[int]]  # group → units to go, ascending
    homes: dict[str, str]  # group → the component that its units are listed under
    parameters: dict[str, tuple[int, int]]  # component → before, after
    macs: dict[str, tuple[int, int]]  # component → planning MACs before, after
    rotated: list[str] = field(default_factory=list)  # groups whose units are of a rotated basis

    @property
    def achieved(self) -> float:
        """The sparsity that it leads to."""
        return 1 - sum(after for _, after in self.parameters.values()) / self.dense_parameters

    @property
    def widths_after(self) -> dict[str, int]:
        return {name: n - len(self.removed.get(name, ())) for name, n in self.widths.items()}

    def explain(self) -> str:
        """The plan as a Markdown table: per component, before → after."""
        after = self.widths_after
        units: dict[str, list[int]] = {home: [0, 0] for home in self.homes.values()}
        for group, home in self.homes.items():
            units[home][0] += self.widths[group]
            units[home][1] += after[group]
        rows = []
        for name in dict.fromkeys([*self.parameters, *units]):
            groups = [g for g, home in self.homes.items() if home == name]
            rows.append(
                [name]
                + [_arrow(pair.get(name)) for pair in (units, self.parameters, self.macs)]
                + [", ".join(_arrow((self.widths[g], after[g])) for g in groups)]
            )
        totals = [
            [sum(pair[side] for pair in table.values()) for side in (0, 1)]
            for table in (units, self.parameters, self.macs)
        ]
        rows.append(["all", *map(_arrow, totals), ""])
        head = ["component", "units", "parameters", "planning MACs", "widths"]
        table = tabulate(rows, head, tablefmt="github", disable_numparse=True)
        return (
            f"{self.method}, {self.allocation} allocation: sparsity {self.achieved:.3f} "
            f"(asked for {self.sparsity:.3f}) of {self.dense_parameters} dense parameters"
            f"{', rotated: ' + ', '.join(self.rotated) if self.rotated else ''}\n\n{table}"
        )

    def check(self, structure: Structure) -> None:
        """Refuse a structure that the plan was not made for.

        Raises:
            UserError: with the first difference.
        """
        there = structure.widths
        for name, width in self.widths.items():
            if name not in there:
                raise UserError(f"the plan does not fit: there is no group '{name}' here")
            if there[name] != width:
                raise UserError(
                    f"the plan does not fit: group '{name}' has {there[name]} units here, "
                    f"the plan was made for {width}"
                )
        for name in there:
            if name not in self.widths:
                raise UserError(f"the plan does not fit: it does not know group '{name}'")
        for name, units in self.removed.items():
            width = self.widths.get(name, 0)
            if any(not 0 <= unit < width for unit in units) or len(set(units)) >= max(width, 1):
                raise UserError(f"the plan is damaged: it cannot take {units} from group '{name}'")

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(self.as_json())
        part.replace(path)

    def as_json(self) -> str:
        return json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> Plan:
        """The plan that `save` wrote.

        Raises:
            UserError: there is none, or it is damaged.
        """
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"plan '{path}' cannot be read: {error}") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise UserError(f"'{path}' is no plan of this package (no '{FORMAT}' in it)")
        known = {own.name for own in fields(Plan)}
        needed = {own.name for own in fields(Plan) if own.default_factory is MISSING}
        if not needed <= set(values) <= known:
            wrong = sorted((needed - set(values)) | (set(values) - known))[0]
            raise UserError(f"plan '{path}' is damaged: '{wrong}' is missing or unknown")
        return Plan.of(values)

    @staticmethod
    def of(values: dict) -> Plan:
        """The plan that these JSON types describe."""
        pairs = {
            name: {key: tuple(pair) for key, pair in values[name].items()}
            for name in ("parameters", "macs")
        }
        return Plan(**values | pairs)


def plan_of(
    structure: Structure,
    order: Mapping[str, np.ndarray],
    after: Mapping[str, int],
    how: tuple[str, str],
    sparsity: float,
    dense: Mapping[str, int],
) -> Plan:
    """The plan that leaves these widths.

    Args:
        structure: the present groups.
        order: group → its units, least important first.
        after: group → units that stay.
        how: method and allocation that chose them.
        sparsity: that was asked for.
        dense: component → parameters of the dense network.
    """
    widths, parameters, macs = structure.widths, structure.parameters(), structure.macs()
    parameters_after, macs_after = structure.parameters(after), structure.macs(after)
    method, allocation = how
    return Plan(
        method=method,
        allocation=allocation,
        sparsity=sparsity,
        dense_parameters=sum(dense.values()),
        widths=widths,
        removed={
            name: sorted(order[name][: widths[name] - after[name]].tolist())
            for name in widths
            if after[name] < widths[name]
        },
        homes={group.name: group.home for group in structure.groups},
        parameters={name: (n, parameters_after[name]) for name, n in parameters.items()},
        macs={name: (n, macs_after[name]) for name, n in macs.items()},
    )


def _arrow(pair) -> str:
    return "" if pair is None else f"{pair[0]} → {pair[1]}"
