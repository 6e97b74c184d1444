"""An agent as one object: networks, settings, the task that it acts in, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tdmpc_prune.agent.config import AgentConfig, PlannerConfig
from tdmpc_prune.agent.planner import planning_macs
from tdmpc_prune.agent.world_model import Widths, WorldModel

CARD = "card.md"  # beside a shipped agent's files


@dataclass(frozen=True)
class Interface:
    """What the numbers that an agent takes and gives mean outside, as its task says."""

    observation: tuple[tuple[str, int], ...]  # name and size of each part, in order
    low: tuple[float, ...]  # [A] what an action of −1 is, in the actuators' own units
    high: tuple[float, ...]  # [A] the same of 1
    control_period: float | None  # seconds per decision; None: the task does not say


@dataclass(frozen=True)
class Agent:
    """What acts. What learns it lies in a run's checkpoint beside it."""

    model: WorldModel
    config: AgentConfig
    task: str
    action_repeat: int  # simulator steps per decision
    provenance: dict[str, Any] = field(default_factory=dict)  # seed, env steps, commands, returns …
    parent: Path | None = None  # folder of the dense agent that it was cut from
    folder: Path | None = None  # from which it was loaded
    interface: Interface | None = None  # None: not on file, as in older checkpoints

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def card(self) -> str | None:
        """The card that it was shipped with, Markdown; None if there is none."""
        path = self.folder / CARD if self.folder else None
        return path.read_text() if path and path.is_file() else None

    @property
    def dense_widths(self) -> Widths:
        """Its widths before anything was cut."""
        widths = self.model.widths
        return Widths.dense(self.config.network, widths.observation, widths.action)

    @property
    def is_dense(self) -> bool:
        """Whether nothing has been cut from it."""
        return self.model.widths == self.dense_widths

    def size(self) -> dict[str, float]:
        """Sparsity (fraction of the dense parameters that is gone), parameters, planning MACs."""
        with torch.device("meta"):
            dense = WorldModel(self.dense_widths)
        parameters, dense_parameters = (
            sum(parameter.numel() for parameter in each.parameters())
            for each in (self.model, dense)
        )
        return {
            "sparsity": 1 - parameters / dense_parameters,
            "parameters": parameters,
            "macs": planning_macs(self.model, self.config.planner),
        }

    def with_planner(self, planner: PlannerConfig) -> Agent:
        """The same networks with another planner budget."""
        return replace(self, config=replace(self.config, planner=planner))
