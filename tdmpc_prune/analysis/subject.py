"""A trained network under examination: its groups, its score, and what becomes of cut copies.

An agent's score is its return, an autoencoder's the PSNR. The network itself is never changed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.stats import t as student_t
from torch import Tensor, nn, no_grad, randn, zeros_like
from torch.nn import functional as F

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.planner import follow_policy, sequence_values
from tdmpc_prune.autoencoder.computation import autoencoder_computation
from tdmpc_prune.autoencoder.learner import AutoencoderLearner
from tdmpc_prune.autoencoder.model import Autoencoder, psnr
from tdmpc_prune.evaluation import EVALUATION_SEED, evaluate
from tdmpc_prune.prunable import Calibration
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.groups import Structure, find_groups
from tdmpc_prune.pruning.importance import Tracker
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.refit import commit_refitted
from tdmpc_prune.pruning.surgery import commit
from tdmpc_prune.saving.autoencoders import is_autoencoder, load_autoencoder
from tdmpc_prune.settings import from_plain
from tdmpc_prune.training import launch
from tdmpc_prune.training.autoencoder import AutoencoderTraining, image_calibration
from tdmpc_prune.training.config import AutoencoderConfig, PruneCheckpointConfig

_LEAST_LOSS = 1e-3  # of an agent; the whole network's own would be 0, which has no logarithm
_SEARCH_SEED = 10_000  # added to the evaluations' seed while a search compares plans
_SEQUENCES = 8  # action sequences that are compared at an observation
_SEQUENCE_NOISE = 0.5  # standard deviation, on the policy's actions


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
    """A trained network, and all that is asked of it."""

    score: str  # what `measure` returns
    networks: dict[str, nn.Module]
    structure: Structure
    before: Score  # of the network as it is
    densities: dict[str, np.ndarray]  # metric → `[U]` importance per parameter of every unit

    def loss(self, networks: dict[str, nn.Module]) -> Tensor:
        """Of one new batch; positive."""

    def measurement(self, plan: Plan, searching: bool = False) -> Callable[[], Score]:
        """Cut a copy by `plan`, and refit it unless the settings say not.

        What comes back measures its score, here or in another process.
        A search has episodes or images of its own, so that its winner is not judged by luck.
        """

    def fine_tuned(self, plan: Plan, length: int) -> Score:
        """Of a copy that is cut, and trained for so long after it."""


def load_subject(
    checkpoint: str, prune: PruneConfig, episodes: int, seed: int, threads: int = 1
) -> Subject:
    """The autoencoder or the agent of a checkpoint.

    Args:
        checkpoint: a run or a checkpoint.
        prune: the metrics, and how the gradients are gathered.
        episodes: of an agent, for each measurement.
        seed: of the batches.
        threads: CPU threads of the training after a cut.

    Raises:
        UserError: there is no such checkpoint.
    """
    if is_autoencoder(checkpoint):
        return _Autoencoder(checkpoint, prune, seed, threads)
    settings = PruneCheckpointConfig(
        checkpoint, prune, 0, seed=seed, device="cpu", threads=threads, eval_episodes=episodes
    )
    return _Agent(settings)


class _Autoencoder:
    score = "PSNR, dB"

    def __init__(self, checkpoint: str, prune: PruneConfig, seed: int, threads: int):
        saved = load_autoencoder(checkpoint)
        settings = replace(
            from_plain(AutoencoderConfig, saved.config),
            seed=seed,
            prune=PruneConfig(),
            start_from=None,
            threads=threads,
        )
        self._prune = prune
        self._training = AutoencoderTraining(settings)
        self._model = saved.model
        self.networks: dict[str, nn.Module] = {"model": self._model}
        self.structure = find_groups(autoencoder_computation(self._model))

    @cached_property
    def before(self) -> Score:
        return _psnr(self._model, self._training.images.test)

    @cached_property
    def densities(self) -> dict[str, np.ndarray]:
        learner = self._learner(self._model)
        tracker = Tracker(self.structure, self._model, self._prune, self._training.config.seed)
        learner.gradient_hooks.append(tracker)
        for _ in range(self._prune.gather_updates):
            learner.update(self._training.batch(), learn=False)
        return {m: tracker.densities(m, self._model) for m in self._prune.tracked}

    def loss(self, networks: dict[str, nn.Module]) -> Tensor:
        images = self._training.batch()
        return F.mse_loss(networks["model"](images), images)

    def measurement(self, plan: Plan, searching: bool = False) -> Callable[[], Score]:
        images = self._training.images
        shown = images.train[: len(images.test)] if searching else images.test
        return partial(_psnr, self._cut(plan), shown)

    def fine_tuned(self, plan: Plan, length: int) -> Score:
        learner = self._learner(self._cut(plan))
        for _ in range(length):
            learner.update(self._training.batch())
        return _psnr(learner.model, self._training.images.test)

    def _cut(self, plan: Plan) -> Autoencoder:
        model = copy.deepcopy(self._model)
        computation = autoencoder_computation(model)
        if self._prune.refit:
            seed = self._training.config.seed
            calibration = image_calibration(model, self._training.images, seed)
            commit_refitted(plan, self.structure, computation, calibration)
        else:
            commit(plan, self.structure, computation)
        return model

    def _learner(self, model: Autoencoder) -> AutoencoderLearner:
        return AutoencoderLearner(model, self._training.config.learning.learning_rate)


@no_grad()
def _psnr(model: Autoencoder, images: Tensor) -> Score:
    return Score.of(psnr(images, model(images)).tolist())


class _Agent:
    score = "return"

    def __init__(self, config: PruneCheckpointConfig):
        self._config = config
        self._run = launch.assemble(launch.pruning_run(config, []))
        self._training = self._run.trainee
        self._learner = self._training.learner
        self.networks: dict[str, nn.Module] = {
            "model": self._learner.model,
            "target": self._learner.target,
        }
        self.structure = self._run.pruner.structure
        self._agent = self._training.agent()
        self._whole = copy.deepcopy(self._learner.model)  # while `networks` are masked

    @cached_property
    def before(self) -> Score:
        return _return(self._agent, self._config.eval_episodes, EVALUATION_SEED)

    @cached_property
    def densities(self) -> dict[str, np.ndarray]:
        self._run.gather_all()
        return self._run.pruner.all_densities(1.0)

    @cached_property
    def _calibration(self) -> Calibration:
        self._run.gather_all()
        return self._training.calibration()

    def loss(self, networks: dict[str, nn.Module]) -> Tensor:
        """How differently action sequences are scored, and how differently the policy acts.

        The sequences are those of the whole network's policy with noise, from recorded
        observations. Scores are centred at each observation, since the planner only compares
        there: 1 - their correlation with the whole network's. The policy's mean square error is in
        units of the variance of its actions.
        """
        training, discount = self._training, self._agent.config.learning.discount
        batch, _ = training.replay.sample(self._agent.config.learning.batch, training.rng, "cpu")
        observations = batch.observation.unsqueeze(1)  # [B, 1, O]
        action_width = batch.actions.shape[-1]
        shape = (self._agent.config.planner.horizon, len(observations), _SEQUENCES, action_width)
        noise = _SEQUENCE_NOISE * randn(shape, generator=training.generator)
        with no_grad():
            latents = self._whole.encode(observations)
            actions, visited = follow_policy(self._whole, latents, noise)
            wanted = sequence_values(self._whole, visited, actions, zeros_like(noise[0]), discount)
            acts = self._whole.act(latents)
        model = networks["model"]
        latents = model.encode(observations)
        visited = model.rollout(latents.expand(-1, _SEQUENCES, -1), actions)
        found = sequence_values(model, visited, actions, zeros_like(noise[0]), discount)
        acted = F.mse_loss(model.act(latents), acts) / acts.var().clamp(min=1e-6)
        return 1 - _correlation(found, wanted) + acted + _LEAST_LOSS

    def measurement(self, plan: Plan, searching: bool = False) -> Callable[[], Score]:
        model, target = copy.deepcopy((self._learner.model, self._learner.target))
        computation = agent_computation(model, target, self._agent.config)
        if self._config.prune.refit:
            commit_refitted(plan, self.structure, computation, self._calibration)
        else:
            commit(plan, self.structure, computation)
        seed = EVALUATION_SEED + (_SEARCH_SEED if searching else 0)
        agent = replace(self._agent, model=model)
        return partial(_return, agent, self._config.eval_episodes, seed)

    def fine_tuned(self, plan: Plan, length: int) -> Score:
        if not length:
            return self.measurement(plan)()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            plan.save(path)
            prune = replace(
                self._config.prune, plan=str(path), max_return_drop=1e9, eval_episodes=1
            )
            run = replace(
                self._config, prune=prune, env_steps=length, run_dir=str(Path(folder) / "run")
            )
            return Score.of(launch.start(launch.pruning_run(run, []), []).run().returns)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of `[B, N]` and `[B, N]`, each centred over N."""
    one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    product = (one.square().sum() * other.square().sum()).sqrt()
    return (one * other).sum() / product.clamp(min=1e-12)


def _return(agent: Agent, episodes: int, seed: int) -> Score:
    return Score.of(evaluate(agent, episodes, seed).returns)
