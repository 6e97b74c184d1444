"""What a run does when its pruning is due: one function for each small step.

`Course` decides what is due and does it to the networks; here is what surrounds it in a run:
measurements, history, TensorBoard, plans on file, checkpoints. The same for every kind of run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tdmpc_prune.errors import RunError
from tdmpc_prune.pruning.pruner import Course, Learner
from tdmpc_prune.pruning.surgery import SurgeryError
from tdmpc_prune.training import report as pruning_report
from tdmpc_prune.training.log import RunLog


class Run(Protocol):
    """A run that can be pruned."""

    run_dir: Path
    log: RunLog
    course: Course

    @property
    def now(self) -> int:
        """The time, in the course's unit."""

    def step(self) -> bool:
        """Do the next small thing; False at the end."""

    def gather(self) -> None:
        """Show the gradients of a batch to the learner's hooks; nothing is learned from it."""

    def measure(self) -> tuple[dict[str, float], dict[str, Any]] | None:
        """Mean and std of the score and what else is to be shown; and more for the history.

        None if a signal came meanwhile.
        """

    def take_back(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> Learner:
        """Go on with a learner of these weights and this state."""

    def keep(self, folder: Path) -> None:
        """Save the networks as they are, without what is needed to go on, unless it was done."""

    def save(self) -> Path:
        """Save everything that the rest of the run depends on."""


def gather(run: Run) -> None:
    """Show the tracker the gradients of a batch."""
    run.gather()
    run.course.gathered()
    course = run.course
    done, of = course.stage.gathered, course.config.gather_updates
    run.log.progress(doing=f"gathering gradients ({done} of {of})" if done < of else "")


def gather_all(run: Run) -> None:
    """Play and gather what the importance needs, without changing anything saved."""
    with tempfile.TemporaryDirectory() as folder:
        run.log = RunLog(Path(folder), run.now, run.now, 0, run.course.unit)
        while run.course.due(run.now) == "gather":
            run.step()
        run.log.close()


def parent_dir(run_dir: Path) -> Path:
    """Where a run keeps the dense agent that its own comes from."""
    return run_dir / "agents" / "dense"


def measure(run: Run) -> None:
    """The score before a cut, right after it, and while it recovers."""
    found = run.measure()
    if found is None:
        return
    course, now = run.course, run.now
    if course.sparsity == 0:
        run.keep(parent_dir(run.run_dir))
    measured, more = found
    moment, record = course.measured(now, measured)
    size = course.size()
    run.log.record("tracking", now, moment=moment, step=record["step"], **measured, **more, **size)
    run.log.scalars(now, {f"pruning/{course.score}": measured["mean"]})
    run.log.networks(now, size)
    if moment in ("recovered", "not recovered"):
        run.log.record("pruning step", now, **record)
        run.log.say(pruning_report.sentence(record, course))
    if moment == "recovered":
        run.keep(run.run_dir / "agents" / f"step-{record['step']}")
        run.save()


def cut(run: Run) -> None:
    """Plan a cut, write the plan down, and carry it out."""
    course, now = run.course, run.now
    plan = course.next_plan(now)
    if not plan.removed:
        course.skip()
        return
    if not course.stage.changes and (doubt := pruning_report.doubt(course)):
        run.log.record("warning", now, text=doubt, scores=course.stage.dense_scores)
        run.log.say(f"note: {doubt}")
    step = course.stage.step + 1
    folder = run.run_dir / "plans"
    folder.mkdir(exist_ok=True)
    plan.save(folder / f"step-{step}.json")
    (folder / f"step-{step}.md").write_text(plan.explain() + "\n")
    try:
        course.cut(plan, now)
    except SurgeryError as error:
        raise RunError(f"cut {step} was undone and the run stopped: {error}") from error
    size = course.size()
    run.log.record("cut", now, step=step, target=plan.sparsity, **size)
    run.log.say(pruning_report.cut_sentence(step, now, plan.sparsity, size, course))


def undo(run: Run) -> None:
    """Go back to the networks, optimisers and tracker before a cut that did not recover."""
    course, now = run.course, run.now
    course.undo(run.take_back(*course.before_cut()))
    size = course.size()
    run.log.record("undone", now, step=course.stage.record["step"], **size)
    run.log.networks(now, size)
    run.save()


def log_importance(run: Run) -> None:
    """Importance by group and component, and how alike the metrics rank the units."""
    course, now = run.course, run.now
    importance = course.importance(now)
    if not importance:
        return
    correlations = course.rank_correlations(now)
    run.log.record("importance", now, **importance, correlations=correlations)
    run.log.scalars(
        now,
        {
            f"unit importance by {kind[:-1]}/{metric}/{name}": value  # "unit" sorts last
            for kind, metrics in importance.items()
            for metric, values in metrics.items()
            for name, value in values.items()
        }
        | {f"unit rank correlation/{pair}": value for pair, value in correlations.items()},
    )


def conclude(run: Run) -> None:
    """What a finished pruning run reached, in its history, and its pictures."""
    run.log.record("end", run.now, **run.course.outcome(run.now))
    for path in pruning_report.save(run.run_dir, run.course):
        run.log.picture(f"pruning/{path.stem}", path, run.now)
