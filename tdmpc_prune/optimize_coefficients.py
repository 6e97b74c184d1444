"""Find how much to take from each group of a trained network, and see what the cut costs.

The search is `pruning.coefficients`. A subject is what it needs of a trained network: groups, a
loss, a ranking, the task metric of a cut copy (PSNR, return), and fine-tuning.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tdmpc_prune import prune_checkpoint
from tdmpc_prune.agent.learner import model_loss
from tdmpc_prune.autoencoder.learner import AutoencoderLearner
from tdmpc_prune.autoencoder_training import (
    AutoencoderTrainer,
    autoencoder_computation,
    load_autoencoder,
    saved_config,
)
from tdmpc_prune.checkpoint import checkpoint_dir
from tdmpc_prune.compression import agent_computation
from tdmpc_prune.config import (
    CoefficientsConfig,
    CompareCoefficientsConfig,
    PruneCheckpointConfig,
)
from tdmpc_prune.evaluation import evaluate
from tdmpc_prune.pruning.coefficients import Ranking, by_gradient, by_grid
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.groups import Structure, find_groups
from tdmpc_prune.pruning.importance import Tracker
from tdmpc_prune.pruning.plan import Plan, make_plan
from tdmpc_prune.pruning.surgery import commit
from tdmpc_prune.training import EVALUATION_SEED, Trainer


class Subject(Protocol):
    """A trained network, and all that a search asks of it."""

    score: str  # what `measure` returns
    networks: dict[str, nn.Module]
    structure: Structure

    def densities(self, prune: PruneConfig) -> np.ndarray:
        """`[U]` importance per parameter of every unit, from the gradients of some batches."""

    def loss(self, networks: dict[str, nn.Module]) -> Tensor:
        """Of one new batch; positive."""

    def measure(self, plan: Plan | None = None) -> float:
        """The score of a copy that is cut by `plan`, or of the network as it is."""

    def fine_tuned(self, plan: Plan, length: int) -> float:
        """The score of a copy that is cut, and trained for so long after it."""


def load_subject(config: CoefficientsConfig) -> Subject:
    """The autoencoder or the agent of a checkpoint. Raises UserError: there is none."""
    folder = checkpoint_dir(config.checkpoint)
    kind = _Autoencoder if (folder / "autoencoder.json").is_file() else _Agent
    return kind(config)


class _Autoencoder:
    score = "PSNR, dB"

    def __init__(self, config: CoefficientsConfig):
        settings = replace(saved_config(config.checkpoint), seed=config.seed, prune=PruneConfig())
        self._trainer = AutoencoderTrainer(settings, Path(config.checkpoint))
        self._model = load_autoencoder(config.checkpoint)
        self.networks: dict[str, nn.Module] = {"model": self._model}
        self.structure = find_groups(autoencoder_computation(self._model))

    def densities(self, prune: PruneConfig) -> np.ndarray:
        learner = self._learner(self._model)
        tracker = Tracker(self.structure, self._model, prune, self._trainer.config.seed)
        learner.gradient_hooks.append(tracker)
        for _ in range(prune.gather_updates):
            learner.update(self._trainer.batch(), learn=False)
        return tracker.densities(prune.method, self._model, 1.0)

    def loss(self, networks: dict[str, nn.Module]) -> Tensor:
        images = self._trainer.batch()
        return F.mse_loss(networks["model"](images), images)

    def measure(self, plan: Plan | None = None) -> float:
        return float(np.mean(self._trainer.psnr(self._cut(plan))))

    def fine_tuned(self, plan: Plan, length: int) -> float:
        learner = self._learner(self._cut(plan))
        for _ in range(length):
            learner.update(self._trainer.batch())
        return float(np.mean(self._trainer.psnr(learner.model)))

    def _cut(self, plan: Plan | None):
        model = copy.deepcopy(self._model)
        if plan is not None:
            computation = autoencoder_computation(model)
            commit(plan, find_groups(computation), computation)
        return model

    def _learner(self, model) -> AutoencoderLearner:
        return AutoencoderLearner(model, self._trainer.config.learning.learning_rate)


class _Agent:
    score = "return"

    def __init__(self, config: CoefficientsConfig):
        self._config = config
        self._trainer = Trainer(
            prune_checkpoint.training_config(self._pruning(config.prune, 0)), Path(".")
        )
        self._learner = self._trainer.learner
        self._agent = self._trainer.config.model
        self.networks: dict[str, nn.Module] = {
            "model": self._learner.model,
            "target": self._learner.target,
        }
        self.structure = self._trainer.course.structure

    def _pruning(self, prune: PruneConfig, env_steps: int, run_dir: str | None = None):
        return PruneCheckpointConfig(
            self._config.checkpoint,
            prune,
            env_steps,
            seed=self._config.seed,
            device="cpu",
            threads=self._config.threads,
            eval_episodes=self._config.episodes,
            run_dir=run_dir,
        )

    def densities(self, prune: PruneConfig) -> np.ndarray:
        return prune_checkpoint.gathered_densities(self._trainer)

    def loss(self, networks: dict[str, nn.Module]) -> Tensor:
        """What the planner uses: predicted rewards and values over the horizon, and the policy's
        actions beside those of the network as it is."""
        trainer, learning, model = self._trainer, self._agent.learning, networks["model"]
        batch, _ = trainer.replay.sample(learning.batch, trainer.rng, "cpu")
        noise = torch.zeros_like(batch.actions)
        terms = model_loss(model, networks["target"], batch, noise, learning)
        with torch.no_grad():
            whole = self._learner.model
            wanted = whole.act(whole.encode(batch.observation))
        acted = F.mse_loss(model.act(model.encode(batch.observation)), wanted)
        return learning.reward_weight * terms.reward + learning.value_weight * terms.value + acted

    def measure(self, plan: Plan | None = None) -> float:
        model, target = copy.deepcopy((self._learner.model, self._learner.target))
        if plan is not None:
            computation = agent_computation(model, target, self._agent)
            commit(plan, find_groups(computation), computation)
        config = self._trainer.config
        return evaluate(
            model,
            self._agent,
            config.task,
            config.action_repeat,
            self._config.episodes,
            EVALUATION_SEED,
        ).mean

    def fine_tuned(self, plan: Plan, length: int) -> float:
        if not length:
            return self.measure(plan)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            plan.save(path)
            prune = replace(self._config.prune, plan=str(path), max_return_drop=1e9)
            run = self._pruning(prune, length, str(Path(folder) / "run"))
            return prune_checkpoint.start(run, []).run().mean


@dataclass(frozen=True)
class Found:
    """What one method found."""

    method: str
    coefficients: dict[str, float]  # group → fraction of its units that goes, of the plan
    sparsity: float  # of the cut network
    before: float  # score of the network as it is
    cut: float  # right after the cut
    fine_tuned: float
    evaluations: int  # of the loss (gradient) or of the score (grid) during the search
    seconds: float  # of the search


def search(
    config: CoefficientsConfig, subject: Subject, densities: np.ndarray
) -> tuple[Found, Plan]:
    """Find coefficients by the method of `config`, cut, and fine-tune a copy.

    Raises:
        UserError: the sparsity cannot be reached, or not within the tolerance.
    """
    began = time.perf_counter()
    dense = subject.structure.parameters()
    evaluations = 0
    ranking = Ranking(subject.structure, densities, config.prune, dense, config.largest)
    if config.method in ("grid", "gradient"):
        with tqdm(desc=config.method, leave=False) as bar:

            def progress(done: int, of: int) -> None:
                bar.total = of
                bar.update(done - bar.n)

            if config.method == "gradient":
                wanted, evaluations = by_gradient(
                    ranking, subject.networks, subject.loss, config.sparsity, progress
                )
            else:
                wanted, evaluations = by_grid(
                    ranking,
                    subject.measure,
                    config.sparsity,
                    config.tolerance,
                    config.budget,
                    progress,
                )
    else:
        settings = replace(config.prune, allocation=config.method, round_to=1)
        base = make_plan(subject.structure, densities, settings, config.sparsity, dense)
        wanted = {name: len(base.removed.get(name, ())) / n for name, n in base.widths.items()}
    plan = ranking.plan(wanted, config.sparsity, config.tolerance, config.method)
    seconds = time.perf_counter() - began
    after = plan.widths_after
    found = Found(
        method=config.method,
        coefficients={name: 1 - after[name] / width for name, width in plan.widths.items()},
        sparsity=plan.achieved,
        before=subject.measure(),
        cut=subject.measure(plan),
        fine_tuned=subject.fine_tuned(plan, config.fine_tuning),
        evaluations=evaluations,
        seconds=seconds,
    )
    return found, plan


def text(found: Found, score: str) -> str:
    """What was found, as Markdown."""
    rows = [(name, f"{value:.3f}") for name, value in found.coefficients.items()]
    table = tabulate(rows, ["group", "coefficient"], "pipe", disable_numparse=True)
    return (
        f"{table}\n\n"
        f"{found.method}: sparsity {found.sparsity:.4f}; {score}: {found.before:.2f} before, "
        f"{found.cut:.2f} after the cut, {found.fine_tuned:.2f} after fine-tuning; "
        f"{found.evaluations} evaluations in {found.seconds:.1f} s"
    )


# --- The comparison ---------------------------------------------------------------------------

ARMS = {  # name → method, metric that ranks
    "uniform magnitude": ("uniform", "magnitude"),
    "global magnitude": ("global", "magnitude"),
    "global bayesian": ("global", "bayesian"),
    "grid": ("grid", "bayesian"),
    "gradient": ("gradient", "bayesian"),
}


@dataclass(frozen=True)
class Row:
    """One arm on one checkpoint at one sparsity."""

    checkpoint: str
    arm: str
    found: Found


def compare(config: CompareCoefficientsConfig) -> tuple[list[Row], str]:
    """Every arm on every checkpoint at every sparsity; and the name of the score.

    Raises:
        UserError: see `search` and `load_subject`.
    """
    rows, score = [], ""
    total = len(config.checkpoints) * len(ARMS) * len(config.sparsities)
    with tqdm(total=total, desc="comparing", unit="cut") as bar:
        for checkpoint in config.checkpoints:
            for arm, (method, metric) in ARMS.items():
                one = CoefficientsConfig(
                    checkpoint=checkpoint,
                    method=method,
                    tolerance=config.tolerance,
                    largest=config.largest,
                    budget=config.budget,
                    fine_tuning=config.fine_tuning,
                    episodes=config.episodes,
                    prune=replace(config.prune, method=metric),
                    seed=config.seed,
                    threads=config.threads,
                )
                subject = load_subject(one)
                densities, score = subject.densities(one.prune), subject.score
                for sparsity in config.sparsities:
                    found, _ = search(replace(one, sparsity=sparsity), subject, densities)
                    rows.append(Row(checkpoint, arm, found))
                    bar.update()
    return rows, score


def comparison_table(rows: list[Row], sparsities: list[float], score: str) -> str:
    """Score right after the cut → after fine-tuning, means over the checkpoints, as Markdown."""
    before = np.mean([row.found.before for row in rows])
    lines = []
    for arm in ARMS:
        cells = []
        for sparsity in sparsities:
            own = [
                r.found for r in rows if r.arm == arm and abs(r.found.sparsity - sparsity) < 0.05
            ]
            means = [np.mean([getattr(f, name) for f in own]) for name in ("cut", "fine_tuned")]
            cells.append(" → ".join(f"{mean:.2f}" for mean in means))
        own = [r.found for r in rows if r.arm == arm]
        cells.append(f"{np.mean([f.evaluations for f in own]):.0f}")
        cells.append(f"{np.mean([f.seconds for f in own]):.1f}")
        lines.append([arm, *cells])
    names = ["", *(f"sparsity {sparsity:g}" for sparsity in sparsities), "evaluations", "seconds"]
    table = tabulate(lines, names, "pipe", disable_numparse=True)
    count = len({row.checkpoint for row in rows})
    return f"{score}, mean of {count} checkpoint(s); before the cut {before:.2f}\n\n{table}"


def comparison_csv(rows: list[Row]) -> str:
    """One line for each cut."""
    text = io.StringIO()
    names = [field.name for field in fields(Found) if field.name != "coefficients"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["checkpoint", "arm", *names, "coefficients"])
    for row in rows:
        values = [getattr(row.found, name) for name in names]
        writer.writerow([row.checkpoint, row.arm, *values, json.dumps(row.found.coefficients)])
    return text.getvalue()
