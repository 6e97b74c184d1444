"""Evaluations end once their mean is known, and say so; what must be whole is whole."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tdmpc_prune.envs import make_env

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.evaluation import Evaluation, evaluate, is_known
from tdmpc_prune.saving.run_folder import RunFolder
from tdmpc_prune.signals import Stopped
from tdmpc_prune.training import launch
from tests.small import AGENT, PRUNE, small_config
from tests.synthetic import REACH_STEPS, Steady
from tests.test_resume import assert_same_run, resume

STEADY, CHANCY = (f"gym:tests.synthetic:{name}-v0" for name in ("Steady", "Chancy"))


def agent_for(task):
    model = WorldModel(Widths.dense(AGENT.network, 1, 1), torch.Generator().manual_seed(0))
    return Agent(model, AGENT, task, 1)


def steady_config(run_dir, **changes):
    """A run whose every evaluation is known after three episodes, pruned once or twice."""
    prune = replace(PRUNE, steps=2, eval_episodes=5)
    return small_config(run_dir, task=STEADY, eval_episodes=6, prune=prune, **changes)


@pytest.mark.parametrize(
    ("returns", "known"),
    [
        ([850.0], False),  # nothing is known of its error
        ([850.0, 850.0], True),
        ([-850.0, -850.0, -850.0], True),
        ([0.0, 0.0, 0.0], False),  # a rare reward may still come
        ([100.0, 102.0, 98.0, 100.0], True),  # the error is 0.8
        ([100.0, 104.0, 96.0, 100.0], False),
    ],
)
def test_a_mean_is_known_when_its_standard_error_is_small_beside_it(returns, known):
    assert is_known(returns) is known


def test_an_evaluation_ends_once_its_mean_is_known():
    found = evaluate(agent_for(STEADY), 10, 0, decisions="native", least=4)
    assert found.returns == [REACH_STEPS] * 4 and found.known
    assert found.decisions == 4 * REACH_STEPS
    assert found.first(4).known and not found.first(3).known


def test_where_returns_differ_all_episodes_are_played():
    found = evaluate(agent_for(CHANCY), 10, 0, decisions="native", least=3)
    assert found.returns == [0, REACH_STEPS] * 5 and not found.known


@pytest.mark.parametrize("given", [{"decisions": "native"}, {"decisions": "torch", "least": 3}])
def test_without_a_least_and_by_pytorch_all_are_played(given):
    found = evaluate(agent_for(STEADY), 5, 0, **given)
    assert found.returns == [REACH_STEPS] * 5 and not found.known


def test_after_an_episode_that_broke_off_all_others_are_played(monkeypatch):
    whole, broken = Steady.reset, []

    def second_fails(self, *, seed=None, options=None):
        if seed == 1:
            raise RuntimeError("no licence left")
        return whole(self, seed=seed, options=options)

    monkeypatch.setattr(Steady, "reset", second_fails)
    agent = agent_for(STEADY)
    found = evaluate(agent, 5, 0, broken=broken.append, decisions="native", least=3)
    assert found.returns == [REACH_STEPS, 0] + [REACH_STEPS] * 3 and not found.known
    assert len(broken) == 1


@pytest.mark.parametrize("task", ["cartpole-swingup", "finger-turn-hard", "cup-catch"])
def test_an_environment_that_is_reset_again_is_as_good_as_a_new_one(task):
    def played(env, seed):
        rng = np.random.default_rng(seed)
        seen = [env.reset(seed=seed)[0]]
        for _ in range(20):
            observation, reward, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            seen += [observation, [reward]]
        return np.concatenate(seen)

    again = make_env(task)
    for seed in (3, 4):
        assert np.array_equal(played(again, seed), played(make_env(task), seed))


@pytest.fixture(scope="module")
def steady(once):
    def make(folder):
        launch.start(steady_config(folder / "run"), []).run()

    return once("steady", make)[0] / "run"


def test_a_run_plays_whole_at_its_end_and_before_its_first_cut(steady):
    folder = RunFolder(steady)
    evaluations = folder.read_history("evaluation")
    assert [len(e["returns"]) for e in evaluations] == [3, 3, 3, 6]
    assert evaluations[0]["updates"] > 0
    assert all(e["mean_return"] == REACH_STEPS for e in evaluations)
    first, *others = folder.read_history("tracking")
    assert (first["moment"], len(first["returns"])) == ("before", 5)
    assert {t["moment"] for t in others} == {"before", "after", "recovered"}
    assert all(len(t["returns"]) == (5 if t["env_steps"] == 200 else 3) for t in others)


def test_a_measurement_that_was_known_is_enough_unless_all_are_wanted(tmp_path):
    run = launch.start(steady_config(tmp_path / "run"), [])
    made = []

    def measure(samples, least, *rest):
        made.append((samples, least))
        return Evaluation([7.0] * (least or 3), 1, 1.0, known=(least or 3) < samples)

    run.trainee.measure = measure
    run.log = type("Quiet", (), {"progress": lambda *_, **__: None})()
    assert len(run.measure(6)) == len(run.measure(5)) == len(run.measure(6)) == 3
    assert made == [(6, None)]
    assert len(run.measure(6, least=5)) == len(run.measure(6)) == 5
    assert len(run.measure(6, least=6)) == 6
    assert len(run.measure(5)) == 5 and len(run.measure(6, least=6)) == 6
    assert made == [(6, None), (6, 5), (6, 6)]


def test_networks_that_have_learnt_nothing_get_the_fewest_episodes(tmp_path):
    settings = small_config(tmp_path / "run", eval_episodes=6)
    trainee = launch.start(settings, []).trainee
    assert trainee.choice.path == "native" and not trainee.learner.updates
    # Returns of random networks differ: their mean is not known after three.
    assert len(trainee.measure(6, None, lambda: False, None)) == 3
    assert len(trainee.measure(6, 6, lambda: False, None)) == 6
    trainee.learner.updates = 1
    assert len(trainee.measure(6, None, lambda: False, None)) == 6


def test_a_run_with_evaluations_that_end_early_resumes_exactly(steady, tmp_path):
    run, stops = launch.start(steady_config(tmp_path / "run"), []), 0
    while True:
        left = 40

        def interrupted(step=run.step):
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return step()

        run.step = interrupted
        try:
            run.run()
            break
        except Stopped:
            stops += 1
            run = resume(tmp_path / "run")
    assert stops > 5
    assert_same_run(steady, tmp_path / "run")


def test_an_older_run_goes_on_with_whole_evaluations(tmp_path):
    run = launch.start(small_config(tmp_path / "run", eval_episodes=6), [])
    run.save()
    file = tmp_path / "run" / "run.json"
    assert '"eval_least": 3' in file.read_text()
    file.write_text(file.read_text().replace('"eval_least": 3,', ""))
    assert resume(tmp_path / "run").config.eval_least == 6
