"""What an agent tries while it learns: its noise, its curiosity, and when that ends."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc_prune.agent.exploration import Novelty, pink_noise
from tdmpc_prune.agent.learner import Learner
from tdmpc_prune.training import launch
from tdmpc_prune.training.agent import Progress
from tests.small import AGENT, small_config

pytestmark = pytest.mark.usefixtures("undrawn")


@settings(deadline=None, max_examples=10)
@given(decisions=st.integers(2, 600), actions=st.integers(1, 6), seed=st.integers(0, 1000))
def test_pink_noise_has_the_shape_and_spread_of_white(decisions, actions, seed):
    drawn = pink_noise(decisions, actions, np.random.default_rng(seed))
    assert drawn.shape == (decisions, actions)
    assert drawn.dtype == np.float32
    many = pink_noise(decisions, 1500, np.random.default_rng(seed))
    assert many.mean(1) == pytest.approx(np.zeros(decisions), abs=0.15)
    assert many.std(1) == pytest.approx(np.ones(decisions), abs=0.15)


def test_pink_noise_falls_with_frequency():
    power = np.abs(np.fft.rfft(pink_noise(512, 2000, np.random.default_rng(0)), axis=0)) ** 2
    waves = np.arange(2, 200)
    slope = np.polyfit(np.log(waves), np.log(power.mean(1)[waves]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)


def test_what_was_seen_often_is_less_novel():
    rng = np.random.default_rng(0)
    often = rng.normal([0, 0], 0.1, (1000, 2)).astype(np.float32)
    seldom = rng.normal([3, 100], 0.1, (10, 2)).astype(np.float32)
    novelty = Novelty(np.concatenate([often, seldom]), seed=1)
    known, rare, never = (
        novelty(np.array([place], np.float32))[0] for place in ([0, 0], [3, 100], [-3, -100])
    )
    assert 0 < known < 0.1 < rare < never <= 1.1
    assert never > 0.5


def test_novelty_keeps_the_shape_of_what_it_is_asked():
    novelty = Novelty(np.zeros((5, 3), np.float32), seed=0)
    assert novelty(np.zeros((4, 2, 3), np.float32)).shape == (4, 2)


@pytest.mark.parametrize(("task", "met"), [("Reach", True), ("InPlace", False)])
def test_schedules_begin_when_rewards_are_met(tmp_path, task, met):
    trainer = launch.start(
        small_config(tmp_path, task=f"gym:tests.synthetic:{task}-v0", env_steps=100), []
    )
    trainer.run()
    progress = trainer.trainee.progress
    assert progress.met is met
    assert progress.blind == (0 if met else 100)
    floors = [line["value"] for line in scalars(trainer) if line["name"] == "planner/smallest std"]
    assert floors == sorted(floors, reverse=True)
    assert floors[-1] == pytest.approx(0.05 if met else 0.5)


@pytest.mark.parametrize(("curiosity", "most"), [(0.3, 0.33), (0.0, 0.0)])
def test_while_nothing_is_rewarded_the_unknown_is(tmp_path, monkeypatch, curiosity, most):
    """`InPlace` pays nothing, ever."""
    paid, update = [], Learner.update

    def look(learner, batch, *given, **named):
        paid.append(batch.rewards)
        return update(learner, batch, *given, **named)

    monkeypatch.setattr(Learner, "update", look)
    model = replace(AGENT, learning=replace(AGENT.learning, curiosity=curiosity))
    task = "gym:tests.synthetic:InPlace-v0"
    launch.start(small_config(tmp_path, task=task, model=model, env_steps=100), []).run()
    assert len(paid) == 100
    assert all(((rewards > 0) == (most > 0)).all() for rewards in paid)
    assert all((rewards <= most).all() for rewards in paid)


def test_it_is_not_once_rewards_are_met(tmp_path, monkeypatch):
    def asked(*given):
        raise AssertionError("how novel an observation is was asked for")

    monkeypatch.setattr("tdmpc_prune.training.agent.Novelty", asked)
    launch.start(small_config(tmp_path, env_steps=100), []).run()


def scalars(trainer):
    """What was written for TensorBoard, as `{"name", "value"}`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trainer.folder.path))
    events.Reload()
    names = events.Tags()["scalars"]
    return [{"name": n, "value": e.value} for n in names for e in events.Scalars(n)]


def test_older_runs_go_on_as_if_rewards_had_not_been_met_yet():
    assert not Progress().met
    assert Progress().blind == 0
