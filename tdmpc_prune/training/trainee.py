"""What learns in a run, as `training/run.py` sees it: what a kind of network offers to be trained.

An agent is one (`training/agent.py`), an autoencoder is another (`training/autoencoder.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tdmpc_prune.prunable import Calibration, Computation, Learner
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.training.log import Averages, RunLog


class Measured(Protocol):
    """A score of the networks, over episodes or images."""

    mean: float
    std: float
    known: bool  # it ended before the last of them, because the mean was known

    def __len__(self) -> int: ...

    def first(self, count: int) -> Measured:
        """The score over the first of them alone."""


class Saved(Protocol):
    """Networks as a checkpoint holds them."""

    is_dense: bool
    parent: Path | None  # folder of the dense networks that they were cut from
    folder: Path
    provenance: dict[str, Any]


class Trainee(Protocol):
    """What learns in a run.

    Attributes:
        unit: of time, as the setting of the run's length is called: "env_steps", "updates".
        score: what is measured: "return", "PSNR".
        script: that trains it, for the line that says how to go on.
        what: it is, how big, and where, for the first line of a run.
        remark: what a person should know beside that, or None.
        learning_rate: the setting's name, for the line that says what may help.
        config: the run's settings: `prune`, `seed`, `eval_every`, `start_from` and its own.
        learner: networks, optimisers, updates so far.
        averages: of its losses and times since they were last logged.
        samples: how many episodes or images an evaluation has, and a measurement around a cut.
    """

    unit: str
    score: str
    script: str
    learning_rate: str
    what: str
    remark: str | None
    config: Any
    learner: Learner
    averages: Averages
    samples: tuple[int, int]

    @property
    def now(self) -> int:
        """The time."""

    @property
    def end(self) -> int:
        """The time at which the run ends."""

    @property
    def first_update(self) -> int:
        """Time up to which nothing is learnt."""

    @property
    def unfinished(self) -> bool:
        """Whether something has begun that nothing may interrupt: an episode."""

    @property
    def owes_updates(self) -> bool:
        """Whether updates are to be made before anything is measured or cut."""

    def advance(self, log: RunLog) -> float | None:
        """The next small thing: a decision, an update. A score of the training, if it gave one.

        Raises:
            NonFiniteLoss: before anything has changed.
        """

    def gather(self, log: RunLog) -> bool:
        """Show the gradients of a batch to the learner's hooks; nothing is learned from it.

        False if there was no data yet, and it went on to get some.
        """

    def rehearse(self) -> None:
        """Try, before anything is written, what can be tried."""

    def measure(
        self, samples: int, least: int | None, interrupted: Callable[[], bool], log: RunLog
    ) -> Measured | None:
        """The networks' score over so many episodes or images; None if it was interrupted.

        It may end once its mean is known, but not before `least`; None is as configured.
        """

    def said(self, measured: Measured) -> str:
        """A measurement in words."""

    def evaluated(self, measured: Measured, log: RunLog) -> dict[str, Any]:
        """What an evaluation adds to the history; an `averages` that waits for it is logged."""

    def of_each(self, measured: Measured) -> dict[str, Any]:
        """What the history of a cut says of each episode."""

    def size(self) -> dict[str, float]:
        """Of the networks: sparsity, parameters, and MACs of what it does with them."""

    def dense_parameters(self) -> dict[str, int]:
        """Component → parameters before anything was cut."""

    def computation(self) -> Computation:
        """All that it does with its networks."""

    def settle(self) -> None:
        """Let the networks that learn be those that are measured and saved, if they differ."""

    def calibration(self) -> Calibration:
        """The data by which its networks are ranked and refitted, as they are now.

        Raises:
            UserError: there is not enough yet.
        """

    def mend(self, whole: Mapping[str, Tensor], plan: Plan, done: int, most: int) -> int:
        """Train the networks offline to follow what they were before a cut.

        Args:
            whole: the model's weights before it, in the basis that the plan is of.
            plan: of the cut.
            done: steps tried before, since the cut.
            most: of them in all.

        Returns:
            Steps done now, at least one.

        Raises:
            NonFiniteLoss, UserError: nothing has changed.
        """

    def take_learner(self, model: nn.Module, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on with this model, and with its learner's saved state if there is one."""

    def rebuild(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Go on with a learner of these weights and this state, after as many updates as now."""

    def state(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """All else that the rest of its training depends on: JSON types, and files of tensors."""

    def load(self, path: Path) -> Saved:
        """Networks of its kind. Raises UserError: there are none."""

    def load_state(
        self, saved: Saved, values: dict[str, Any], files: dict[str, dict[str, Tensor]]
    ) -> None:
        """Go on from networks and what `state` returned with them."""

    def take_over(
        self, saved: Saved, values: dict[str, Any] | None, files: dict[str, dict[str, Tensor]]
    ) -> None:
        """Start from another run's networks, and from its state if there is one."""

    def measurement(self, values: dict[str, Any]) -> Measured:
        """The measurement that `vars` made these values of."""

    def write_networks(
        self,
        folder: Path,
        measured: Measured | None,
        provenance: dict[str, Any],
        parent: Path | None,
    ) -> None:
        """Write what is needed to use the networks."""

    def conclude(self, folder: RunFolder, log: RunLog) -> list[str]:
        """Record and draw what its kind of run has at its end; the lines that a person is told."""

    def close(self) -> None:
        """Let go of what it holds."""
