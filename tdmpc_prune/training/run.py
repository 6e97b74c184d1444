"""A run: the one loop for whatever learns, with its pruning, its log and its checkpoints.

A run is a sequence of small steps (a decision, an update, an evaluation, a cut), and everything
that the next step depends on is in the checkpoint. A run that was stopped or killed therefore goes
on with the very numbers that it would have had. What learns is a `Trainee`: an agent
(`training/agent.py`) or an autoencoder (`training/autoencoder.py`). What is to be cut, and whether
it stays cut, the `Pruner` decides; here is what surrounds it in a run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tdmpc_prune.envs import TaskError
from tdmpc_prune.errors import NonFiniteLoss, RunError, UserError
from tdmpc_prune.prunable import Calibration
from tdmpc_prune.pruning.pruner import Pruner
from tdmpc_prune.pruning.stage import RunFacts
from tdmpc_prune.pruning.surgery import SurgeryError
from tdmpc_prune.saving.files import write_folder
from tdmpc_prune.saving.run_folder import RunFolder, load_training
from tdmpc_prune.settings import to_plain, typed
from tdmpc_prune.signals import Stopped, StopRequest
from tdmpc_prune.training import report
from tdmpc_prune.training.log import Averages, RunLog
from tdmpc_prune.training.report import words_of
from tdmpc_prune.training.trainee import Measured, Trainee
from tdmpc_prune.words import counted

_IMPORTANCES = 5  # times that importance is logged per evaluation


@dataclass
class Clocks:
    """What a run keeps the time of."""

    next_evaluation: int
    next_importance: int = 0  # when importance is logged
    history: int = 0  # lines of the history


class Run:
    """One run: `run()` takes it to its end or to a signal."""

    def __init__(self, trainee: Trainee, folder: RunFolder):
        """Set everything up; nothing is written.

        Raises:
            UserError: `start_from` is of something else, or the pruning does not fit the run.
        """
        self.trainee = trainee
        self.folder = folder
        self.config = config = trainee.config
        self.commands: list[str] = []  # that led to these networks, their parents' first
        self.measured: Measured | None = None  # the last
        self.pruning_seconds = 0.0  # of CPU time, in this process: gathering, cutting, mending
        self._measured_version: list[int] | None = None  # of the networks that it is of
        if config.start_from:
            self._take_over(config.start_from)
        self.clocks = Clocks(self._evaluation_after(trainee.now))
        self.pruner: Pruner | None = None
        if config.prune.method != "none":
            facts = RunFacts(
                dense=trainee.dense_parameters(),
                first=trainee.now,
                last=trainee.end,
                unit=trainee.unit,
                score=trainee.score,
                seed=config.seed,
                gather=bool(config.start_from),
            )
            self.pruner = Pruner(config.prune, facts, trainee.learner, trainee.computation())
        self._stop_request = StopRequest()
        self._loaded: Path | None = None  # the checkpoint that it goes on from
        self.was_finished = False  # there was nothing left to do
        self.closing: list[str] = []  # what a person is told at its end
        self.log: RunLog | None = None

    @property
    def now(self) -> int:
        return self.trainee.now

    @property
    def history(self) -> list[dict[str, Any]]:
        """All lines of its history so far, in order; each says its `kind`."""
        return self.folder.read_history()

    def run(self, name: str = "") -> Measured:
        """Train to the end and return the last measurement.

        Args:
            name: of the run, see `RunLog`.

        Raises:
            UserError: another process is at work in the run's folder, or was since it was loaded.
            Stopped: a signal came; the state is saved.
            RunError: a loss is not finite (the state before it is saved), the task fails again
                and again (likewise), or saving failed.
        """
        with self.folder.owned():
            self.folder.check_newest(self._loaded)
            return self._run_owned(name)

    def _run_owned(self, name: str) -> Measured:
        trainee, folder = self.trainee, self.folder
        history = self.clocks.history
        self.log = RunLog(folder, self.now, trainee.end, history, trainee.unit, name)
        self.log.hyperparameters(to_plain(self.config), trainee.score)
        self.log.say(self._first_line())
        if trainee.remark:
            self.log.say(trainee.remark)
        try:
            with self._stop_request:
                self.was_finished = True
                while self.step():
                    self.was_finished = False
                    if self._stop_request:
                        self._stop()
            self._conclude()
        except TaskError as error:
            saved = self.save()
            raise RunError(
                f"stopped at {self.now} {words_of(trainee.unit)} because {error}; the state is "
                f"saved in {saved}; when the task is mended, go on with resume={folder}"
            ) from error
        except OSError as error:
            raise RunError(
                f"writing to '{folder}' failed: {error.strerror}; the newest checkpoint is whole, "
                f"go on with: {self._how_to_go_on()}"
            ) from error
        finally:
            self.log.close()
            trainee.close()
        return self.measured

    def _first_line(self) -> str:
        """What the run is about to do."""
        trainee, now = self.trainee, self.now
        since = f" from {now:,}" if now else ""
        cuts = f"; {report.announcement(self.pruner, now)}" if self.pruner else ""
        return f"{trainee.what}{since} to {trainee.end:,} {words_of(trainee.unit)}{cuts}"

    def _how_to_go_on(self) -> str:
        return typed(self.trainee.script, resume=self.folder)

    def step(self) -> bool:
        """The next small step of the run; False once it has reached its end."""
        trainee, pruner = self.trainee, self.pruner
        due = pruner.due(self.now) if pruner else None
        if trainee.unfinished:
            self._advance()
        elif due == "gather":
            self._timed(self._gather)
        elif trainee.owes_updates:
            self._advance()
        elif due == "measure":
            self._measure()
        elif due == "mend":
            self._timed(self._mend)
        elif due == "undo":
            self._undo()
        elif self.now >= self.clocks.next_evaluation:
            self._evaluate()  # before a cut that is due at the same time
        elif due == "cut":
            self._timed(self._cut)
        elif self.now >= trainee.end:
            return False
        else:
            self._advance()
        return True

    def _timed(self, step: Callable[[], None]) -> None:
        began = time.process_time()
        step()
        self.pruning_seconds += time.process_time() - began

    # --- Training and evaluating -----------------------------------------------------------

    def _advance(self) -> None:
        trainee, before = self.trainee, self.now
        try:
            score = trainee.advance(self.log)
        except NonFiniteLoss as error:
            saved = self.save()
            raise RunError(
                f"stopped after {trainee.learner.updates} updates because {error}; the state is "
                f"saved in {saved}; try a smaller {trainee.learning_rate}"
            ) from error
        if not self.pruner:
            return
        if score is not None:
            self.pruner.hint(score)
        if self.now > before and self.now >= self.clocks.next_importance:
            later = max(1, self.config.eval_every // _IMPORTANCES)
            self.clocks.next_importance = self.now + later
            self._log_importance()

    def _evaluate(self) -> None:
        """Evaluate and save; nothing if a signal comes meanwhile."""
        episodes = self.trainee.samples[0]
        measured = self.measure(episodes, episodes if self.now >= self.trainee.end else None)
        if measured is None:
            return
        trainee, now, score = self.trainee, self.now, self.trainee.score
        self.clocks.next_evaluation = self._evaluation_after(now)
        size = self.size()
        if self.pruner:
            self.pruner.scored(now, measured.mean)
        record = trainee.evaluated(measured, self.log)
        self.log.record("evaluation", now, **record, **size)
        self.log.scalars(
            now,
            {f"evaluation/{score}": measured.mean, f"evaluation/std of {score}": measured.std},
        )
        self.log.networks(now, size)
        updates = trainee.learner.updates
        after = "" if trainee.unit == "updates" else f", after {counted(updates, 'update')}"
        self.log.say(
            f"evaluation at {now:,} {words_of(trainee.unit)}: {trainee.said(measured)}, sparsity "
            f"{size['sparsity']:.3f}{after}"
        )
        self.save()

    def size(self) -> dict[str, float]:
        """Of the networks: sparsity, parameters, and MACs of what is done with them."""
        return self.pruner.size() if self.pruner else self.trainee.size()

    def _evaluation_after(self, now: int) -> int:
        """When the next evaluation is due; one comes at the end of the run."""
        later = (now // self.config.eval_every + 1) * self.config.eval_every
        return min(later, self.trainee.end) if now < self.trainee.end else later

    def measure(self, samples: int, least: int | None = None) -> Measured | None:
        """The present networks' score; it is not measured again if nothing changed since.

        Args:
            samples: episodes or images.
            least: so many, even if the score is known before; None is as configured.

        Returns:
            None if a signal comes meanwhile.
        """
        version, latest = self._version(), self.measured
        if self._measured_version == version and (
            len(latest) >= samples or (latest.known and len(latest) >= (least or 0))
        ):
            return latest.first(samples)
        self.log.progress(doing="evaluating")
        measured = self.trainee.measure(samples, least, lambda: bool(self._stop_request), self.log)
        if measured is not None:
            self.measured, self._measured_version = measured, version
            self.log.progress(doing="")
        return measured

    def _version(self) -> list[int]:
        """Equal as long as the networks are the same: their updates, and the changes by pruning."""
        return [self.trainee.learner.updates, self.pruner.stage.changes if self.pruner else 0]

    def take_networks(self, networks: nn.Module) -> None:
        """Go on with other networks, of which nothing is known yet."""
        self.trainee.take_learner(networks, {}, 0)
        self._measured_version = None

    # --- Pruning ----------------------------------------------------------------------------

    def _gather(self) -> None:
        """Show the tracker the gradients of a batch."""
        if self.trainee.gather(self.log):
            self.pruner.gathered()
            done, of = self.pruner.stage.gathered, self.pruner.to_gather
            self.log.progress(doing=f"gathering gradients ({done} of {of})" if done < of else "")

    def gather_all(self) -> None:
        """Play and gather what the importance needs, without changing anything saved."""
        with tempfile.TemporaryDirectory() as folder:
            self.log = RunLog(RunFolder(folder), self.now, self.now, 0, self.trainee.unit)
            while self.pruner.due(self.now) == "gather":
                self.step()
            self.log.close()

    def _measure(self) -> None:
        """The score before a cut, right after it, and while it recovers."""
        pruner, now = self.pruner, self.now
        evaluated, around_cuts = self.trainee.samples
        due = now >= self.clocks.next_evaluation  # it can then use the same episodes
        samples, least = evaluated if due else around_cuts, None
        if now >= self.trainee.end:
            least = samples
        elif pruner.sparsity == 0:  # all cuts are held against it
            least = around_cuts
        measured = self.measure(samples, least)
        if measured is None:
            return
        measured = measured.first(around_cuts)
        if pruner.sparsity == 0:
            self.keep(self.folder.dense)
        shown = {"mean": measured.mean, "std": measured.std}
        moment, record = pruner.measured(now, shown)
        size = pruner.size()
        more = self.trainee.of_each(measured)
        step = record["step"]
        self.log.record("tracking", now, moment=moment, step=step, **shown, **more, **size)
        self.log.scalars(now, {f"pruning/{self.trainee.score}": measured.mean})
        self.log.networks(now, size)
        if moment in ("recovered", "not recovered"):
            self.log.record("pruning step", now, **record)
            self.log.say(report.sentence(record, pruner))
        if moment == "recovered":
            self.keep(self.folder.after_cut(record["step"]))
            self.save()

    def _cut(self) -> None:
        """Plan a cut, write the plan down, carry it out, and fit what is left."""
        pruner, now, step = self.pruner, self.now, self.pruner.stage.step + 1
        self.log.progress(doing="cutting")
        self.trainee.settle()
        try:
            calibration = self.calibration()
            proposal = pruner.propose(now, calibration)
            plan = proposal.plan
            if not plan.removed:
                pruner.skip()
                return
            if not pruner.stage.changes and (doubt := report.doubt(pruner)):
                self.log.record("warning", now, text=doubt, scores=pruner.stage.dense_scores)
                self.log.say(f"note: {doubt}")
            self.folder.write_plan(step, plan.as_json(), plan.explain())
            refit = pruner.cut(proposal, now, calibration if self.config.prune.refit else None)
        except SurgeryError as error:
            raise RunError(f"cut {step} was undone and the run stopped: {error}") from error
        except UserError as error:
            saved = self.save()
            raise UserError(
                f"cut {step} was not made: {error}; the state is saved in {saved}"
            ) from error
        finally:
            self.log.progress(doing="")
        size = pruner.size()
        self.log.record("cut", now, step=step, target=plan.sparsity, **size)
        self.log.say(report.cut_sentence(step, now, plan.sparsity, size, pruner))
        if refit:
            self.folder.write_plan(step, plan.as_json(), f"{plan.explain()}\n\n{refit.table()}")
            self.log.refit(now, step, refit)

    def _mend(self) -> None:
        """Train the cut networks offline against those before the cut."""
        pruner, trainee, record = self.pruner, self.trainee, self.pruner.stage.record
        self.log.progress(doing="mending")
        whole, plan = pruner.whole()
        before = pruner.networks()
        try:
            steps = trainee.mend(whole, plan, record["offline_steps"], self.config.prune.distil)
        except (NonFiniteLoss, UserError) as error:
            pruner.leave_unmended()
            steps, cut = 0, record["step"]
            failed = f"the latest offline steps after cut {cut} were taken back: {error}"
            self.log.record("warning", self.now, text=failed)
            self.log.say(f"note: {failed}")
        else:
            pruner.mended(before, steps)
        self.log.progress(doing="")
        self.log.record("mending", self.now, step=record["step"], steps=steps)

    def calibration(self) -> Calibration | None:
        """The data for the next cut, if it needs any. Raises UserError: there is none."""
        prune = self.config.prune
        return self.trainee.calibration() if prune.refit or prune.by_data else None

    def _undo(self) -> None:
        """Go back to the networks, optimisers and tracker before a cut that did not recover."""
        pruner, now = self.pruner, self.now
        self.trainee.rebuild(*pruner.before_cut())
        pruner.undo(self.trainee.learner, self.trainee.computation())
        size = pruner.size()
        self.log.record("undone", now, step=pruner.stage.record["step"], **size)
        self.log.networks(now, size)
        self.save()

    def _log_importance(self) -> None:
        """Importance by group and component, and how alike the metrics rank the units."""
        importance = self.pruner.importance(self.now)
        if importance:
            correlations = self.pruner.rank_correlations(self.now)
            self.log.importance(self.now, importance, correlations)

    # --- Saving and going on ---------------------------------------------------------------

    def keep(self, folder: Path) -> None:
        """Save the networks as they are, without what is needed to go on, unless it was done."""
        if not folder.exists():
            write_folder(folder, self._write_networks)

    def _write_networks(self, folder: Path) -> None:
        provenance: dict[str, Any] = {"commands": self.commands}
        if self.pruner:
            provenance["pruning"] = self.pruner.provenance(self.now)
        measured = self.measured if self._measured_version == self._version() else None
        parent = self.folder.dense if self.folder.dense.exists() else None
        self.trainee.write_networks(folder, measured, provenance, parent)

    def save(self) -> Path:
        """Save everything that the rest of the run depends on.

        Raises:
            RunError: it could not be written; what was saved before is whole.
        """
        trainee = self.trainee
        if self.log:
            self.clocks.history = self.log.history
        values, files = trainee.state()
        values |= {
            "progress": vars(self.clocks) | values["progress"],
            "updates": trainee.learner.updates,
            "averages": vars(trainee.averages),
            "evaluation": vars(self.measured) if self.measured else None,
            "evaluated": self._measured_version,
        }
        if self.pruner:
            values["pruning"], files["pruning"] = self.pruner.state()
        return self.folder.save_checkpoint(self.now, self._write_networks, values, files)

    def load(self) -> None:
        """Take up the newest state that `save` wrote.

        Raises:
            UserError: it is damaged, or is no run's state.
        """
        trainee = self.trainee
        saved = trainee.load(self.folder.path)
        self._loaded = saved.folder
        values, files = load_training(saved.folder)
        trainee.load_state(saved, values, files)
        self.commands = saved.provenance.get("commands", [])
        if self.pruner:
            self.pruner.attach(trainee.learner, trainee.computation())
            self.pruner.load_state(values["pruning"], files["pruning"])
        # Older runs of autoencoders keep their clocks among the other values.
        progress = values.get("progress", values)
        self.clocks = Clocks(**{name: progress[name] for name in vars(self.clocks)})
        if self.now < trainee.end:
            self.clocks.next_evaluation = min(self.clocks.next_evaluation, trainee.end)
        trainee.averages = Averages(**values["averages"])
        self._take_measurement(values)

    def _take_over(self, start_from: str) -> None:
        """Start from a checkpoint of another run: its networks, and all that was learnt on."""
        trainee = self.trainee
        saved = trainee.load(Path(start_from))
        values, files = None, {}
        if (saved.folder / "training.json").is_file():
            values, files = load_training(saved.folder)
        trainee.take_over(saved, values, files)
        self.commands = list(saved.provenance.get("commands", []))
        changes = values["pruning"]["stage"]["changes"] if values and "pruning" in values else 0
        if values and values.get("evaluated") == [values["updates"], changes]:
            self._take_measurement(values)
            self._measured_version = [values["updates"], 0]

    def _take_measurement(self, values: dict[str, Any]) -> None:
        if values.get("evaluation"):
            self.measured = self.trainee.measurement(values["evaluation"])
            self._measured_version = values.get("evaluated")

    def _stop(self) -> None:
        self.save()
        raise Stopped(
            f"stopped by {self._stop_request.name} at {self.now} {words_of(self.trainee.unit)}; "
            f"go on with: {self._how_to_go_on()}",
            self._stop_request.number,
        )

    def _conclude(self) -> None:
        """What a finished run says of itself: in its history, in pictures, and to a person."""
        self.closing = self.trainee.conclude(self.folder, self.log)
        if self.pruner:
            self.log.record("end", self.now, **self.pruner.outcome(self.now))
            for path in report.save(self.folder, self.pruner):
                self.log.picture(f"pruning/{path.stem}", path, self.now)
