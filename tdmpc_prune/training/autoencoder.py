"""Training an autoencoder on images, pruned by the same course as the agent.

Like an agent's run it goes in small steps, and everything that the next step depends on is in the
checkpoint. Time is counted in updates; the score is the PSNR on images that are not learnt from.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tdmpc_prune.autoencoder.computation import autoencoder_computation
from tdmpc_prune.autoencoder.data import load_images
from tdmpc_prune.autoencoder.learner import AutoencoderLearner
from tdmpc_prune.autoencoder.model import Autoencoder, Widths, psnr
from tdmpc_prune.errors import RunError, UserError
from tdmpc_prune.machine import set_threads, versions
from tdmpc_prune.prunable import component_parameters
from tdmpc_prune.pruning.pruner import Course
from tdmpc_prune.saving.autoencoders import FORMAT, load_autoencoder, saved_config, updates_of
from tdmpc_prune.saving.files import save_folder, save_tensors, write_json
from tdmpc_prune.saving.run_folder import (
    check_newest,
    checkpoint_dir,
    create_run,
    load_training,
    owned,
    read_run,
    save_checkpoint,
)
from tdmpc_prune.settings import from_plain, to_plain, typed
from tdmpc_prune.signals import Stopped, StopRequest
from tdmpc_prune.training import report as pruning_report
from tdmpc_prune.training import run as pruning_steps
from tdmpc_prune.training.config import AutoencoderConfig
from tdmpc_prune.training.log import Averages, RunLog
from tdmpc_prune.words import counted

_SHOWN = 10  # images in the pictures

_MAY_CHANGE_ON_RESUME = {"resume", "updates", "threads"}

_IMPORTANCES = 5  # times that importance is logged per evaluation


class AutoencoderTrainer:
    """One run: `run()` takes it to its end or to a signal. A `pruning_steps.Run`."""

    def __init__(self, config: AutoencoderConfig, run_dir: Path):
        """Set everything up; nothing is written.

        Raises:
            UserError: the images are missing or damaged, the pruning cannot be carried out, or
                `start_from` is of another network.
        """
        self.config = config
        self.run_dir = run_dir
        set_threads(config.threads)
        self.images = load_images(config.data.name, config.data.dir)
        height, width = self.images.train.shape[2:]
        network = config.network
        self.dense = Widths(
            network.kind == "convolutional",
            height,
            width,
            tuple(network.widths),
            network.latent_width,
            tuple(reversed(network.widths)),
        )
        torch.manual_seed(config.seed)
        self.learner = AutoencoderLearner(Autoencoder(self.dense), config.learning.learning_rate)
        self.rng = np.random.default_rng(config.seed)
        dense = {
            name: sum(parameter.numel() for parameter in own)
            for name, own in component_parameters(self.model).items()
        }
        if config.start_from:
            self._take_over(checkpoint_dir(config.start_from))
        self.course: Course | None = None
        if config.prune.method != "none":
            self.course = Course(
                config.prune,
                self.learner,
                lambda learner: autoencoder_computation(learner.model),
                dense,
                (self.now, config.updates),
                "updates",
                "PSNR",
                config.seed,
                gather=bool(config.start_from),
            )
        following = (self.now // config.eval_every + 1) * config.eval_every
        self.next_evaluation = min(following, config.updates)
        self.next_importance = self.now
        self.last_psnr: list[float] | None = None  # of each image of the test set
        self._measured: list[int] | None = None
        self._stop_request = StopRequest()
        self._averages = Averages()
        self._history = 0
        self._loaded: Path | None = None  # the checkpoint that it goes on from
        self.log: RunLog | None = None

    @property
    def model(self) -> Autoencoder:
        return self.learner.model

    @property
    def now(self) -> int:
        return self.learner.updates

    def run(self) -> float:
        """Train to the end and return the mean PSNR, dB.

        Raises:
            UserError: another process is at work in the run's folder, or was since it was loaded.
            Stopped: a signal came; the state is saved.
            RunError: a loss is not finite, or saving failed.
        """
        with owned(self.run_dir):
            check_newest(self.run_dir, self._loaded)
            return self._run_owned()

    def _run_owned(self) -> float:
        self.log = RunLog(self.run_dir, self.now, self.config.updates, self._history, "updates")
        self.log.hyperparameters(to_plain(self.config), "PSNR")
        self.log.say(self._first_line())
        try:
            with self._stop_request:
                while self.step():
                    if self._stop_request:
                        self.save()
                        raise Stopped(
                            f"stopped by {self._stop_request.name} at {self.now} updates; go on "
                            f"with: {typed('train_autoencoder.py', resume=self.run_dir)}",
                            self._stop_request.number,
                        )
            if self.course:
                pruning_steps.conclude(self)
            self._show_pictures()
        except OSError as error:
            raise RunError(f"writing to '{self.run_dir}' failed: {error.strerror}") from error
        finally:
            self.log.close()
        return float(np.mean(self._psnr()))

    def _first_line(self) -> str:
        """What the run is about to do."""
        config, since = self.config, f" from {self.now:,}" if self.now else ""
        cuts = f"; {pruning_report.announcement(self.course, self.now)}" if self.course else ""
        return (
            f"autoencoder of {config.data.name}: {counted(self.size()['parameters'], 'parameter')} "
            f"on cpu{since} to {config.updates:,} updates{cuts}"
        )

    def step(self) -> bool:
        """The next small step of the run; False once it has reached its end."""
        due = self.course.due(self.now) if self.course else None
        if due == "gather":
            pruning_steps.gather(self)
        elif due == "measure":
            pruning_steps.measure(self)
        elif due == "undo":
            pruning_steps.undo(self)
        elif self.now >= self.next_evaluation:
            self._evaluate()  # before a cut that is due at the same time
        elif due == "cut":
            pruning_steps.cut(self)
        elif self.now >= self.config.updates:
            return False
        else:
            self._update()
        return True

    def batch(self) -> Tensor:
        """Random images to learn from, `[B, 1, H, W]`."""
        count = len(self.images.train)
        return self.images.train[self.rng.integers(count, size=self.config.learning.batch)]

    def _update(self) -> None:
        loss = self.learner.update(self.batch())
        if not np.isfinite(loss):
            raise RunError(f"stopped after {self.now} updates because the loss is {loss}")
        self._averages.add({"losses/reconstruction loss": loss})
        self.log.progress(self.now, loss=f"{loss:.3g}")
        if self.course and self.now >= self.next_importance:
            self.next_importance = self.now + max(1, self.config.eval_every // _IMPORTANCES)
            pruning_steps.log_importance(self)

    @torch.no_grad()
    def psnr(self, model: Autoencoder) -> list[float]:
        """Of each image of the test set, dB."""
        return psnr(self.images.test, model(self.images.test)).tolist()

    def _psnr(self) -> list[float]:
        """The present network's; not computed again if nothing changed since."""
        version = [self.now, self.course.stage.changes if self.course else 0]
        if self._measured != version:
            self.last_psnr, self._measured = self.psnr(self.model), version
        return self.last_psnr

    def _evaluate(self) -> None:
        values = self._psnr()
        every, end = self.config.eval_every, self.config.updates
        later = self.now // every * every + every
        self.next_evaluation = min(later, end) if self.now < end else later
        mean, std = float(np.mean(values)), float(np.std(values))
        size = self.size()
        if self.course:
            self.course.scored(self.now, mean)
        self.log.record("evaluation", self.now, mean=mean, std=std, **size)
        self.log.scalars(self.now, {"evaluation/PSNR": mean} | self._averages.take())
        self.log.networks(self.now, size)
        self.log.say(
            f"evaluation at {self.now:,} updates: PSNR {mean:.2f} dB over "
            f"{counted(len(values), 'image')}, sparsity {size['sparsity']:.3f}"
        )
        self.save()

    def size(self) -> dict[str, float]:
        """The network's size, for logs."""
        if self.course:
            return self.course.size()
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"sparsity": 0.0, "parameters": parameters}

    # --- For its pruning, see `pruning_steps.Run` --------------------------------------------

    def gather(self) -> None:
        self.learner.update(self.batch(), learn=False)

    def measure(self) -> tuple[dict[str, float], dict[str, Any]]:
        values = self._psnr()
        return {"mean": float(np.mean(values)), "std": float(np.std(values))}, {}

    def take_back(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> AutoencoderLearner:
        model = Autoencoder(Widths.of_weights(self.dense, weights))
        model.load_state_dict(weights)
        updates = self.learner.updates
        self.learner = AutoencoderLearner(model, self.config.learning.learning_rate)
        self.learner.load_state(state, updates)
        return self.learner

    def keep(self, folder: Path) -> None:
        if not folder.exists():
            save_folder(folder, self._write_networks)

    # --- Saving and going on -----------------------------------------------------------------

    def save(self) -> Path:
        """Save everything that the rest of the run depends on."""
        training = {
            "updates": self.now,
            "rng": self.rng.bit_generator.state,
            "next_evaluation": self.next_evaluation,
            "next_importance": self.next_importance,
            "averages": vars(self._averages),
            "history": self.log.history,
        }
        files = {"training": self.learner.state()}
        if self.course:
            training["pruning"], files["pruning"] = self.course.state()
        return save_checkpoint(self.run_dir, self.now, self._write_networks, training, files)

    def _write_networks(self, folder: Path) -> None:
        weights = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        checksum = save_tensors(folder, "autoencoder", weights)
        known = self._measured == [self.now, self.course.stage.changes if self.course else 0]
        description = {
            "format": FORMAT,
            "widths": dataclasses.asdict(self.model.widths),
            "config": to_plain(self.config),
            "provenance": {
                "updates": self.now,
                "psnr": float(np.mean(self.last_psnr)) if known else None,
                "pruning": self.course.provenance(self.now) if self.course else None,
                "versions": versions(),
            },
            "sha256": {"autoencoder.safetensors": checksum},
        }
        write_json(folder / "autoencoder.json", description)

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote. Raises UserError: it is damaged."""
        self._loaded = folder
        training, files = load_training(folder)
        weights = load_autoencoder(folder).state_dict()
        self.learner.updates = training["updates"]
        self.take_back(weights, files["training"])
        if self.course:
            self.course.attach(self.learner)
            self.course.load_state(training["pruning"], files["pruning"])
        self.rng.bit_generator.state = training["rng"]
        self.next_evaluation = training["next_evaluation"]
        if self.now < self.config.updates:
            self.next_evaluation = min(self.next_evaluation, self.config.updates)
        self.next_importance = training["next_importance"]
        self._averages = Averages(**training["averages"])
        self._history = training["history"]

    def _take_over(self, folder: Path) -> None:
        """Start from a checkpoint of another run: its network, optimiser and updates.

        Raises:
            UserError: its data or network are not this run's.
        """
        theirs, ours = saved_config(folder), self.config
        for name in ("data", "network"):
            if getattr(theirs, name) != getattr(ours, name):
                raise UserError(f"start_from={folder}: its {name} is not that of this run")
        weights = load_autoencoder(folder).state_dict()
        state: dict[str, Tensor] = {}
        if (folder / "training.json").is_file():
            training, files = load_training(folder)
            state, self.learner.updates = files["training"], training["updates"]
        else:
            self.learner.updates = updates_of(folder)
        self.take_back(weights, state)

    @torch.no_grad()
    def _show_pictures(self) -> None:
        """`reconstructions.png`: originals, the dense network's, and the present one's."""
        rows: dict[str, Tensor] = {"original": self.images.test[:_SHOWN]}
        dense = pruning_steps.parent_dir(self.run_dir)
        if dense.exists():
            rows["dense"] = load_autoencoder(dense)(rows["original"])
        rows["pruned" if self.model.widths != self.dense else "dense"] = self.model(
            rows["original"]
        )
        figure = Figure(figsize=(1 + _SHOWN * 0.8, 0.9 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), _SHOWN)
        for line, (name, images) in zip(axes, rows.items(), strict=True):
            for axis, image in zip(line, images, strict=True):
                axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
                axis.set_xticks([])
                axis.set_yticks([])
            line[0].set_ylabel(name, fontsize=9)
        path = self.run_dir / "reconstructions.png"
        figure.savefig(path, dpi=120)
        self.log.picture("reconstructions", path, self.now)


# --- Starting a run, and going on with one ---------------------------------------------------


def start(config: AutoencoderConfig, command: list[str]) -> AutoencoderTrainer:
    """A new run.

    Raises:
        UserError: its folder already holds one, the images are missing, or its pruning cannot be
            carried out.
    """
    arm = f"{config.prune.method}{'-of-finished' if config.start_from else ''}"
    folder = Path("runs") / f"autoencoder-{config.data.name}" / arm
    run_dir = Path(config.run_dir) if config.run_dir else folder / f"seed{config.seed}"
    trainer = AutoencoderTrainer(config, run_dir)
    if trainer.course:
        trainer.course.check()
    create_run(run_dir, to_plain(config), command)
    return trainer


def resume(config: AutoencoderConfig, given: list[str]) -> AutoencoderTrainer:
    """A run that goes on from its newest checkpoint.

    Raises:
        UserError: there is no such run, it is damaged, or a setting may not change.
    """
    run_dir = Path(config.resume)
    settings = read_run(run_dir)
    if "data" not in settings:
        own = typed("train.py", resume=run_dir)
        raise UserError(f"'{run_dir}' is the run of an agent; go on with: {own}")
    saved = from_plain(AutoencoderConfig, settings)
    if wrong := sorted(set(given) - _MAY_CHANGE_ON_RESUME):
        raise UserError(f"{wrong[0]} cannot change when a run is resumed; updates and threads can")
    changed = {name: getattr(config, name) for name in given if name != "resume"}
    if not any((run_dir / "checkpoints").glob("[0-9]*-[0-9]*")):
        # It was killed before its first checkpoint.
        return AutoencoderTrainer(dataclasses.replace(saved, **changed), run_dir)
    # Its own checkpoint holds what it was started with.
    own = {"start_from": None, "prune": dataclasses.replace(saved.prune, plan=None)}
    trainer = AutoencoderTrainer(dataclasses.replace(saved, **changed, **own), run_dir)
    trainer.load(checkpoint_dir(run_dir))
    return trainer


def finish(trainer: AutoencoderTrainer) -> None:
    """Run to the end and say what came of it. Raises: see `AutoencoderTrainer.run`."""
    done = trainer.now
    score = trainer.run()
    size = trainer.size()
    left = f"{size['parameters']:,} parameters"
    if trainer.course:
        left = pruning_report.reached(trainer.course, trainer.now)
    if done == trainer.config.updates:
        longer = typed("train_autoencoder.py", resume=trainer.run_dir, updates=2 * done)
        print(f"the run is finished: it has its {done} updates; make it longer with: {longer}")
    print(
        f"PSNR {score:.2f} dB over {len(trainer.images.test)} images after {trainer.now} updates\n"
        f"{left}\n"
        f"reconstructions   {trainer.run_dir / 'reconstructions.png'}\n"
        f"everything is in  {trainer.run_dir}\n"
        f"compare runs with tensorboard --logdir runs"
    )
