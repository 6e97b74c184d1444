"""Timings against the plain implementation. Slow: they want a quiet machine and minutes."""

import copy
import statistics
import time

import numpy as np
import pytest
import torch

from tdmpc_prune.agent.config import PRESETS
from tdmpc_prune.agent.learner import Learner
from tdmpc_prune.agent.planner import draw_noise, first_means, plan
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.deploy.benchmark import _filled_replay
from tests.reference import PlainLearner, plan_one

pytestmark = pytest.mark.xdist_group("timing")


def ratio(plain, fast, repeats=9):
    """How many times longer `plain` takes: median over runs side by side."""
    times = []
    for i in range(repeats + 2):
        began = time.perf_counter()
        fast()
        middle = time.perf_counter()
        plain()
        if i >= 2:
            times.append((time.perf_counter() - middle) / (middle - began))
    return statistics.median(times)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_not_slower_than_the_plain_implementation(preset):
    """Slow: seconds per call at paper size. Prints the ratios (-s)."""
    torch.set_num_threads(1)
    config = PRESETS[preset].value
    generator = torch.Generator().manual_seed(0)
    model = WorldModel(Widths.dense(config.network, 5, 1), generator)
    other = copy.deepcopy(model)
    learner = Learner(model, config.planner, config.learning)
    plain = PlainLearner(
        other, copy.deepcopy(other).requires_grad_(False), config.planner, config.learning
    )
    batch, _ = _filled_replay(config, 5, 1).sample(config.learning.batch, np.random.default_rng(0))
    noise = torch.randn(11, config.learning.batch, 1)
    update = ratio(lambda: plain.update(batch, noise), lambda: learner.update(batch, generator))
    means, observation = first_means(config.planner, 1, 1), torch.zeros(1, 5)
    draws = draw_noise(config.planner, 1, 1, generator)
    discount = config.learning.discount
    planner = ratio(
        lambda: plan_one(
            model, observation[0], means[:, 0], draws, config.planner, discount, False
        ),
        lambda: plan(model, observation, means, draws, config.planner, discount),
    )
    print(f"\n{preset}: plain / fast: update {update:.2f}, planner {planner:.2f}")
    assert update > 0.9 and planner > 0.95  # a regression, not the goal
