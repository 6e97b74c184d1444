"""Find how much to take from each group of a trained network, and see what the cut costs.

The search is `pruning.coefficients`; here is what it needs of an autoencoder: loss, ranking, the
task metric of a cut network (PSNR), and fine-tuning.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tdmpc_prune.autoencoder.learner import AutoencoderLearner
from tdmpc_prune.autoencoder_training import (
    AutoencoderTrainer,
    autoencoder_computation,
    load_autoencoder,
    saved_config,
)
from tdmpc_prune.config import CoefficientsConfig
from tdmpc_prune.pruning.coefficients import Ranking, by_gradient, by_grid
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.importance import Tracker
from tdmpc_prune.pruning.plan import Plan, make_plan
from tdmpc_prune.pruning.surgery import commit


class Subject:
    """A trained autoencoder, and all that a search asks of it."""

    score = "PSNR, dB"

    def __init__(self, checkpoint: str, seed: int):
        """Load it with the images that it was trained on.

        Raises:
            UserError: there is none, or its images are missing.
        """
        config = replace(saved_config(checkpoint), seed=seed, prune=PruneConfig())
        self._trainer = AutoencoderTrainer(config, Path(checkpoint))
        self._model = load_autoencoder(checkpoint)
        self.networks: dict[str, nn.Module] = {"model": self._model}
        self.structure = find_groups(autoencoder_computation(self._model))

    def densities(self, prune: PruneConfig, seed: int) -> np.ndarray:
        """`[U]` importance per parameter of every unit, from the gradients of some batches."""
        learner = AutoencoderLearner(self._model, self._trainer.config.learning.learning_rate)
        tracker = Tracker(self.structure, self._model, prune, seed)
        learner.gradient_hooks.append(tracker)
        for _ in range(prune.gather_updates):
            learner.update(self._trainer.batch(), learn=False)
        return tracker.densities(prune.method, self._model, 1.0)

    def loss(self, networks: dict[str, nn.Module]) -> Tensor:
        """Of one new batch."""
        images = self._trainer.batch()
        return F.mse_loss(networks["model"](images), images)

    def measure(self, plan: Plan | None = None, fine_tuning: int = 0) -> float:
        """Mean PSNR of the network, cut by `plan`, after so many updates more."""
        model = copy.deepcopy(self._model)
        if plan is not None:
            computation = autoencoder_computation(model)
            commit(plan, find_groups(computation), computation)
        learner = AutoencoderLearner(model, self._trainer.config.learning.learning_rate)
        for _ in range(fine_tuning):
            learner.update(self._trainer.batch())
        return float(np.mean(self._trainer.psnr(model)))


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
    if config.method in ("grid", "gradient"):
        ranking = Ranking(subject.structure, densities, config.prune, dense)
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
        plan = ranking.plan(wanted, config.sparsity, config.tolerance, config.method)
    else:
        settings = replace(config.prune, allocation=config.method, round_to=1)
        plan = make_plan(subject.structure, densities, settings, config.sparsity, dense)
    seconds = time.perf_counter() - began
    after = plan.widths_after
    found = Found(
        method=config.method,
        coefficients={name: 1 - after[name] / width for name, width in plan.widths.items()},
        sparsity=plan.achieved,
        before=subject.measure(),
        cut=subject.measure(plan),
        fine_tuned=subject.measure(plan, config.fine_tuning),
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
