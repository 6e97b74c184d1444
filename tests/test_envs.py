"""Tasks as environments: names, shapes, seeds, ends, action repeat, bad input."""

import ctypes.util
import os
import sys

import numpy as np
import pytest
from tdmpc_prune.envs import TaskError, draw_nothing, make_env, suite_tasks
from tdmpc_prune.envs.tasks import default_action_repeat

DOGS_AND_OTHER_HEAVY_ONES = ("dog", "humanoid-cmu", "stacker", "manipulator", "quadruped")
LIGHT = [name for name in suite_tasks() if not name.startswith(DOGS_AND_OTHER_HEAVY_ONES)]


def test_every_suite_task_has_a_dashed_name():
    tasks = suite_tasks()
    assert len(set(tasks.values())) >= 40
    assert tasks["cartpole-swingup"] == ("cartpole", "swingup")
    assert tasks["cup-catch"] == tasks["ball-in-cup-catch"] == ("ball_in_cup", "catch")
    assert all(name == name.lower() and "_" not in name for name in tasks)


@pytest.mark.parametrize("task", [*LIGHT, "quadruped-walk", "gym:Pendulum-v1", "gym:Hopper-v5"])
def test_spaces_and_seeds(task):
    env = make_env(task)
    first, _ = env.reset(seed=3)
    action = env.action_space.sample()
    step = env.step(action)
    again, _ = env.reset(seed=3)
    assert np.array_equal(first, again)
    assert np.array_equal(step[0], env.step(action)[0])
    assert first.dtype == step[0].dtype == np.float32
    assert first.ndim == 1 and env.observation_space.contains(first)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert np.isfinite(step[0]).all() and np.isfinite(step[1])
    env.close()


def test_published_action_repeats():
    expected = {"cartpole-swingup": 8, "walker-walk": 2, "finger-spin": 2, "humanoid-run": 2}
    expected |= {"dog-run": 2, "reacher-easy": 4, "cheetah-run": 4, "gym:Pendulum-v1": 1}
    assert {task: default_action_repeat(task) for task in expected} == expected


def test_an_episode_is_1000_env_steps_and_ends_by_time():
    env = make_env("cartpole-swingup")
    env.reset(seed=0)
    decisions, truncated = 0, False
    while not truncated:
        *_, terminated, truncated, info = env.step(np.zeros(1, np.float32))
        decisions += 1
        assert not terminated
    assert (decisions, info["env_steps"]) == (125, 1000)


def test_rewards_are_summed_and_steps_counted_when_an_episode_ends_within_a_repeat():
    env = make_env("gym:tests.synthetic:Reach-v0", action_repeat=7)
    env.reset(seed=0)
    start = env.unwrapped.x
    rewards, counts, truncated = [], [], False
    while not truncated:
        _, reward, _, truncated, info = env.step(np.zeros(1, np.float32))
        rewards.append(reward)
        counts.append(info["env_steps"])
    assert counts == [7, 14, 20]
    assert rewards == pytest.approx([7 * (1 - start**2)] * 2 + [6 * (1 - start**2)])


def test_termination_is_not_truncation():
    env = make_env("gym:tests.synthetic:Ledge-v0")
    env.reset(seed=0)
    for _ in range(20):
        *_, terminated, truncated, _ = env.step(np.ones(1, np.float32))
        if terminated or truncated:
            break
    assert terminated and not truncated


def test_lqr_gets_a_time_limit_and_bounded_actions():
    env = make_env("lqr-lqr-2-1")
    env.reset(seed=0)
    for _ in range(250):
        *_, terminated, truncated, _ = env.step(np.ones(1, np.float32))
    assert truncated and not terminated


def test_actions_are_rescaled_and_clipped():
    env = make_env("gym:tests.synthetic:Reach-v0")
    for action, moved in ((1.0, 0.25), (0.5, 0.125), (9.0, 0.25), (-1.0, -0.25)):
        env.reset(seed=0)
        start = env.unwrapped.x
        env.step(np.array([action], np.float32))
        assert env.unwrapped.x - start == pytest.approx(moved)


def test_the_simulator_is_reachable():
    for task in ("cartpole-swingup", "gym:Hopper-v5"):
        env = make_env(task)
        assert type(env.unwrapped.model).__name__ == "MjModel"
        assert type(env.unwrapped.data).__name__ == "MjData"


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no EGL on this machine")
def test_pictures():
    env = make_env("cartpole-swingup", render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8 and picture.std() > 5


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("cartpole-swngup", "closest are cartpole-swingup"),
        ("gym:Pendulum-v7", "closest are gym:Pendulum-v1"),
        ("gym:CartPole-v1", "Discrete actions"),
        ("gym:tests.synthetic:Dictionary-v0", "Dict observations"),
        ("gym:no.such.module:X-v0", "cannot be made"),
        ("", "unknown task"),
    ],
)
def test_bad_tasks_are_one_clear_line(task, message):
    with pytest.raises(TaskError, match=message) as error:
        make_env(task)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="drawing is only left out on Linux")
@pytest.mark.parametrize(
    ("task", "set_before", "after"),
    [
        ("cartpole-swingup", None, "disable"),
        ("cartpole-swingup", "egl", "egl"),
        ("gym:Pendulum-v1", None, None),
        ("file:my_env.py:Arm", None, None),
    ],
)
def test_drawing_is_left_out_of_suite_tasks_unless_somebody_chose(
    monkeypatch, task, set_before, after
):
    monkeypatch.setattr(os, "environ", {"MUJOCO_GL": set_before} if set_before else {})
    draw_nothing(task)
    assert os.environ.get("MUJOCO_GL") == after
