"""What others have published of dense agents: returns over env steps, and how those agents begin.

The returns lie beside this file, one figure a line with its source; nothing is interpolated. Those
of TD-MPC and TD-MPC2 are computed from the results of each seed in their repositories, which are
MIT licensed (Copyright (c) 2021 and 2023 Nicklas Hansen). The others are the highest known to us.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("published.csv")
CURVE = "TD-MPC"  # the agent whose whole curve is there; of others there are single points


@dataclass(frozen=True)
class Figure:
    """A published return."""

    agent: str
    task: str
    env_steps: int  # simulator steps, action repeat included
    mean: float  # over seeds; undiscounted, 0 to 1000
    spread: float | None  # what is published as ±
    spread_kind: str  # "sample std" or "population std" over seeds; "": it is not said
    seeds: int | None
    note: str
    source: str  # repository @ commit: file

    @property
    def learnt(self) -> bool:
        """Whether the agent had made an update by then."""
        return self.note != "before its first update"


@dataclass(frozen=True)
class PublishedAgent:
    """How an agent acts and learns, in words; an empty one was not found."""

    action_repeat: str
    start: str  # what it does before its first update
    updates: str  # per decision
    source: str


AGENTS = {
    "TD-MPC": PublishedAgent(
        "8 (cartpole), 2 (walker), 4 (the others)",
        "5,000 random decisions (40,000, 10,000 and 20,000 env steps), then 5,000 updates at once",
        "1",
        "nicklashansen/tdmpc",
    ),
    "TD-MPC2": PublishedAgent(
        "2",
        "2,500 random decisions (5,000 env steps), then 2,500 updates at once; "
        "nothing is published of it before 100,000 env steps",
        "1",
        "nicklashansen/tdmpc2: tdmpc2/trainer/online_trainer.py",
    ),
    "BRO": PublishedAgent(
        "2, as its figures were collected; 1 in its own code",
        "2,500 random decisions",
        "10",
        "naumix/BiggerRegularizedOptimistic: train_parallel.py",
    ),
    "Simba": PublishedAgent("2", "", "", "dojeon-ai/SimbaV2"),
    "SimbaV2": PublishedAgent("2", "", "", "dojeon-ai/SimbaV2"),
    "MR.Q": PublishedAgent(
        "2",
        "10,000 random decisions (20,000 env steps)",
        "1",
        "facebookresearch/MRQ: MRQ/MRQ.py",
    ),
    "BMPC": PublishedAgent("2", "", "", "wertyuilife2/bmpc"),
}


def figures() -> list[Figure]:
    """Every published figure on file, in the file's order."""
    with TABLE.open(newline="", encoding="utf-8") as table:
        return [
            Figure(
                row["agent"],
                row["task"],
                int(row["env_steps"]),
                float(row["mean"]),
                float(row["spread"]) if row["spread"] else None,
                row["spread_kind"],
                int(row["seeds"]) if row["seeds"] else None,
                row["note"],
                row["source"],
            )
            for row in csv.DictReader(table)
        ]
