"""It learns: synthetic environments with known optima, in seconds. Curves are slow tests."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tdmpc_prune.agent.learner import Learner
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.training import launch
from tdmpc_prune.training.config import TrainConfig
from tdmpc_prune.training.log import Averages
from tests.small import AGENT, PRUNE, small_config
from tests.synthetic import REACH_OPTIMUM

pytestmark = pytest.mark.usefixtures("undrawn")

LEARNER = replace(
    AGENT,
    planner=replace(AGENT.planner, iterations=4, samples=64, elites=12, schedule_decisions=400),
    learning=replace(AGENT.learning, seed_decisions=200, batch=64, buffer_decisions=5000),
)


def test_it_reaches_the_known_optimum(tmp_path):
    config = small_config(
        tmp_path / "run", model=LEARNER, env_steps=1000, eval_every=1000, eval_episodes=10
    )
    evaluation = launch.start(config, []).run()
    assert evaluation.mean > 0.97 * REACH_OPTIMUM
    assert evaluation.mean < REACH_OPTIMUM + 1e-6


@pytest.mark.parametrize("going_on", [False, True])
def test_the_rate_of_a_run_falls_at_its_own_end(tmp_path, monkeypatch, going_on):
    config = small_config(tmp_path / "run")
    if going_on:
        launch.start(config, []).run()
        config = replace(
            config, run_dir=str(tmp_path / "on"), start_from=config.run_dir, env_steps=400
        )
    rates = []
    update = Learner.update

    def noted(self, *arguments, rate=None, **others):
        rates.append(rate)
        return update(self, *arguments, rate=rate, **others)

    monkeypatch.setattr(Learner, "update", noted)
    took, add = [], Averages.add

    def timed(self, values):
        took.extend(v for name, v in values.items() if name == "speed/milliseconds per update")
        return add(self, values)

    monkeypatch.setattr(Averages, "add", timed)
    launch.start(config, []).run()
    assert len(took) == 200 and all(0 < milliseconds < 20_000 for milliseconds in took)
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(5e-5)
    assert len(rates) == 200 and rates.count(1e-3) == 140  # of the last fifth, and its episode


def test_it_is_there_still_with_a_fifth_of_its_parameters(tmp_path):
    """Pruned while it learns, in three cuts."""
    prune = replace(
        PRUNE, sparsity=0.8, start=0.3, end=0.6, min_width=3, max_return_drop=0.1, compare=False
    )
    config = small_config(
        tmp_path / "run", model=LEARNER, prune=prune, env_steps=1600, eval_every=1600
    )
    trainer = launch.start(replace(config, eval_episodes=10), [])
    assert trainer.run().mean > 0.97 * REACH_OPTIMUM
    assert trainer.pruner.sparsity >= 0.8


def test_it_learns_that_termination_ends_the_reward(tmp_path):
    """At the ledge every step pays more the further on, but stepping over it ends the episode."""
    config = small_config(
        tmp_path / "run",
        task="gym:tests.synthetic:Ledge-v0",
        model=LEARNER,
        env_steps=1500,
        eval_every=1500,
        eval_episodes=10,
    )
    trainer = launch.start(config, [])
    trainer.run()
    model = trainer.trainee.model
    with torch.no_grad():
        latent = model.encode(torch.tensor([[0.95], [0.0]]))
        over, still = model.min_q(latent, torch.tensor([[1.0], [0.0]]))
    # Stepping over pays about 2 and nothing after; staying pays about 1 each decision.
    assert over < 5 < still


@pytest.mark.slow
def test_a_pruned_agent_keeps_the_return(tmp_path):
    """Slow: minutes of training on the real task. Nine tenths of the parameters go."""
    config = TrainConfig(
        prune=PruneConfig(method="bayesian"), eval_every=50_000, run_dir=str(tmp_path / "run")
    )
    trainer = launch.start(config, [])
    assert trainer.run().mean >= 0.95 * 850
    assert trainer.pruner.sparsity >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "env_steps", "least"),
    [("cartpole-swingup", 25_000, 800), ("walker-walk", 50_000, 900)],
)
def test_published_tasks(tmp_path, task, env_steps, least):
    """Slow: minutes of training on the real task."""
    config = TrainConfig(
        task=task, env_steps=env_steps, eval_every=env_steps, run_dir=str(tmp_path / "run")
    )
    evaluation = launch.start(config, []).run()
    assert evaluation.mean >= least
    assert np.isfinite(evaluation.returns).all()
