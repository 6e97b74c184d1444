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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from scipy.stats import t as student_t
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tdmpc_prune import prune_checkpoint
from tdmpc_prune.agent.learner import model_loss
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.autoencoder.learner import AutoencoderLearner
from tdmpc_prune.autoencoder.model import Autoencoder
from tdmpc_prune.autoencoder_training import (
    AutoencoderTrainer,
    autoencoder_computation,
    is_autoencoder,
    load_autoencoder,
    saved_config,
)
from tdmpc_prune.compression import agent_computation
from tdmpc_prune.config import (
    CoefficientsConfig,
    CompareCoefficientsConfig,
    PruneCheckpointConfig,
    by_dotted_name,
)
from tdmpc_prune.evaluation import evaluate
from tdmpc_prune.pruning.coefficients import Ranking, by_gradient, by_grid
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.groups import Structure, find_groups
from tdmpc_prune.pruning.importance import Tracker
from tdmpc_prune.pruning.plan import Plan, make_plan
from tdmpc_prune.pruning.surgery import commit
from tdmpc_prune.training import EVALUATION_SEED, Trainer


@dataclass(frozen=True)
class Score:
    """A mean over images or episodes."""

    mean: float
    interval: float  # half of the width of its 95 % confidence interval (Student's t)

    @staticmethod
    def of(values: Sequence[float]) -> Score:
        count = len(values)
        error = np.std(values, ddof=1) / np.sqrt(count) if count > 1 else np.nan
        return Score(float(np.mean(values)), float(student_t.ppf(0.975, count - 1) * error))


class Subject(Protocol):
    """A trained network, and all that a search asks of it."""

    score: str  # what `measure` returns
    networks: dict[str, nn.Module]
    structure: Structure
    before: Score  # of the network as it is

    def densities(self, prune: PruneConfig) -> np.ndarray:
        """`[U]` importance per parameter of every unit, from the gradients of some batches."""

    def loss(self, networks: dict[str, nn.Module]) -> Tensor:
        """Of one new batch; positive."""

    def measure(self, plan: Plan) -> Score:
        """Of a copy that is cut by `plan`."""

    def fine_tuned(self, plan: Plan, length: int) -> Score:
        """Of a copy that is cut, and trained for so long after it."""


def load_subject(config: CoefficientsConfig) -> Subject:
    """The autoencoder or the agent of a checkpoint. Raises UserError: there is none."""
    return (_Autoencoder if is_autoencoder(config.checkpoint) else _Agent)(config)


class _Autoencoder:
    score = "PSNR, dB"

    def __init__(self, config: CoefficientsConfig):
        saved = saved_config(config.checkpoint)
        settings = replace(saved, seed=config.seed, prune=PruneConfig(), start_from=None)
        self._trainer = AutoencoderTrainer(settings, Path(config.checkpoint))
        self._model = load_autoencoder(config.checkpoint)
        self.networks: dict[str, nn.Module] = {"model": self._model}
        self.structure = find_groups(autoencoder_computation(self._model))
        self.before = Score.of(self._trainer.psnr(self._model))

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

    def measure(self, plan: Plan) -> Score:
        return Score.of(self._trainer.psnr(self._cut(plan)))

    def fine_tuned(self, plan: Plan, length: int) -> Score:
        learner = self._learner(self._cut(plan))
        for _ in range(length):
            learner.update(self._trainer.batch())
        return Score.of(self._trainer.psnr(learner.model))

    def _cut(self, plan: Plan) -> Autoencoder:
        model = copy.deepcopy(self._model)
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
        self.before = self._score(self._learner.model)

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

    def measure(self, plan: Plan) -> Score:
        model, target = copy.deepcopy((self._learner.model, self._learner.target))
        computation = agent_computation(model, target, self._agent)
        commit(plan, find_groups(computation), computation)
        return self._score(model)

    def _score(self, model: WorldModel) -> Score:
        config = self._trainer.config
        found = evaluate(
            model,
            self._agent,
            config.task,
            config.action_repeat,
            self._config.episodes,
            EVALUATION_SEED,
        )
        return Score.of(found.returns)

    def fine_tuned(self, plan: Plan, length: int) -> Score:
        if not length:
            return self.measure(plan)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            plan.save(path)
            prune = replace(
                self._config.prune, plan=str(path), max_return_drop=1e9, eval_episodes=1
            )
            run = self._pruning(prune, length, str(Path(folder) / "run"))
            return Score.of(prune_checkpoint.start(run, []).run().returns)


@dataclass(frozen=True)
class Found:
    """What one method found."""

    method: str
    coefficients: dict[str, float]  # group → fraction of its units that goes, of the plan
    sparsity: float  # of the cut network
    before: Score  # of the network as it is
    cut: Score  # right after the cut
    fine_tuned: Score
    evaluations: int  # of a batch's loss (gradient) or of the score (grid) during the search
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
                evaluations = config.steps
                wanted = by_gradient(
                    ranking,
                    subject.networks,
                    subject.loss,
                    config.sparsity,
                    config.steps,
                    progress,
                )
            else:
                wanted, evaluations = by_grid(
                    ranking,
                    lambda plan: subject.measure(plan).mean,
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
        before=subject.before,
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
        f"{found.method}: sparsity {found.sparsity:.4f}; {score}: {_shown(found.before)} before, "
        f"{_shown(found.cut)} after the cut, {_shown(found.fine_tuned)} after fine-tuning "
        f"(± half of the 95 % interval over its images or episodes); {found.evaluations} evaluations in {found.seconds:.1f} s"
    )


def _shown(score: Score) -> str:
    return f"{score.mean:.2f} ± {score.interval:.2f}"


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
                    steps=config.steps,
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
    before = np.mean([row.found.before.mean for row in rows])
    lines = []
    for arm in ARMS:
        cells = []
        for sparsity in sparsities:
            own = [
                r.found for r in rows if r.arm == arm and abs(r.found.sparsity - sparsity) < 0.05
            ]
            pairs = [[f.cut for f in own], [f.fine_tuned for f in own]]
            cells.append(" → ".join(_shown(_mean(scores)) for scores in pairs))
        own = [r.found for r in rows if r.arm == arm]
        cells.append(f"{np.mean([f.evaluations for f in own]):.0f}")
        cells.append(f"{np.mean([f.seconds for f in own]):.1f}")
        lines.append([arm, *cells])
    names = ["", *(f"sparsity {sparsity:g}" for sparsity in sparsities), "evaluations", "seconds"]
    table = tabulate(lines, names, "pipe", disable_numparse=True)
    count = len({row.checkpoint for row in rows})
    return f"{score}, mean of {count} checkpoint(s); before the cut {before:.2f}\n\n{table}"


def _mean(scores: list[Score]) -> Score:
    """Of checkpoints; the interval is that of images or episodes, not of training seeds."""
    means, intervals = zip(*((score.mean, score.interval) for score in scores), strict=True)
    return Score(float(np.mean(means)), float(np.linalg.norm(intervals) / len(scores)))


def comparison_csv(rows: list[Row]) -> str:
    """One line for each cut."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        found = asdict(row.found)
        coefficients = found.pop("coefficients")
        values = by_dotted_name({"checkpoint": row.checkpoint, "arm": row.arm} | found)
        values["coefficients"] = json.dumps(coefficients)
        if row is rows[0]:
            writer.writerow(values)
        writer.writerow(values.values())
    return text.getvalue()
