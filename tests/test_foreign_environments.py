"""Environments as others write them: what is converted, what is refused, and in which words."""

import ctypes.util
import json
import logging
import os
import subprocess
import sys
import types

import gymnasium
import numpy as np
import pytest
import torch
from tdmpc_prune.envs import (
    Film,
    StepError,
    TaskError,
    frame_seconds,
    make_env,
    observation_layout,
    simulator_step_seconds,
    task_name,
)
from tdmpc_prune.envs.suite import SuiteEnv

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.config import AgentConfig, PlannerConfig
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.analysis.config import GroupsConfig, StudyConfig
from tdmpc_prune.deploy.config import BenchmarkConfig, EvaluateConfig
from tdmpc_prune.errors import UserError
from tdmpc_prune.saving.agents import load_agent, save_agent
from tdmpc_prune.saving.run_folder import RunFolder
from tests.commands import REACH, ROOT, SMALL, run, run_process
from tests.small import small_config
from tests.synthetic import Reach

TASK = "gym:tests.synthetic:Reach-v0"
ZERO = np.zeros(1, np.float32)
GOOD = np.array([0.5], np.float32)


def one_step(monkeypatch, returned, observed=None):
    """What `make_env` gives for what a foreign step returns."""
    if observed is not None:
        monkeypatch.setattr(Reach, "observation_space", observed)
        monkeypatch.setattr(Reach, "reset", lambda self, **_: (np.zeros(observed.shape), {}))
    env = make_env(TASK)
    env.reset(seed=3)
    monkeypatch.setattr(Reach, "step", lambda self, action: returned)
    return env.step(ZERO)


def saved(folder, task, observation=1):
    """An untrained agent for a task with one action."""
    widths = Widths(observation, 1, 4, (8,), (8, 8), (8, 8), (8, 8), ((8, 8),))
    model = WorldModel(widths, torch.Generator().manual_seed(0))
    planner = PlannerConfig(horizon=2, iterations=1, samples=16, elites=4)
    provenance = {"seed": 1, "env_steps": 0, "decisions": 0, "updates": 0}
    save_agent(folder, Agent(model, AgentConfig(planner=planner), task, 1, provenance))
    return f"checkpoint={folder}"


def one_line(done, code=2):
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


# --- Values that come in -----------------------------------------------------------------------


def test_observations_are_copies():
    env = make_env("gym:tests.synthetic:InPlace-v0")
    start, _ = env.reset(seed=0)
    seen = [start] + [env.step(np.ones(1, np.float32))[0] for _ in range(3)]
    assert [float(x[0] / start[0]) for x in seen] == pytest.approx([1, 0.9, 0.81, 0.729])


def test_a_foreign_step_cannot_change_our_action():
    env = make_env("gym:tests.synthetic:InPlace-v0", action_repeat=3)
    env.reset(seed=0)
    action = np.ones(1, np.float32)
    env.step(action)
    assert action == 1


@pytest.mark.parametrize(
    "returned",
    [
        (np.array([0.5]), 1, False, False, {}),
        ([0.5], np.float32(1), np.False_, 0, None),
        ((0.5,), np.array([1.0]), np.array(False), np.array([0]), {}),
        (np.array([0.5], np.float16), np.array(1.0), 0, 0.0, types.MappingProxyType({})),
        [GOOD, [1.0], False, False, {}],
        (torch.tensor([0.5]), torch.tensor(1.0), torch.tensor(False), False, {}),
    ],
)
def test_what_has_one_meaning_is_converted(monkeypatch, returned):
    observation, reward, terminated, truncated, info = one_step(monkeypatch, returned)
    assert observation.dtype == np.float32 and observation.tolist() == [0.5]
    assert (type(reward), reward) == (float, 1.0)
    assert terminated is False and truncated is False
    assert info == {"env_steps": 1}


def test_integers_and_tables_become_float32_vectors(monkeypatch):
    table = np.arange(6, dtype=np.uint8).reshape(2, 3)
    observed = gymnasium.spaces.Box(0, 255, (2, 3), np.uint8)
    observation, *_ = one_step(monkeypatch, (table, 0.0, False, False, {}), observed)
    assert observation.dtype == np.float32 and observation.tolist() == [0, 1, 2, 3, 4, 5]
    assert make_env(TASK).observation_space.shape == (6,)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((GOOD, 1.0, False, {}), r"step returned 4 values, where \(observation, reward, term"),
        (None, r"step returned None \(a NoneType\), where"),
        (GOOD, r"step returned a ndarray of shape \(1,\)"),
        ((np.zeros(2), 1.0, False, False, {}), r"shape \(2,\) .*where numbers of shape \(1,\)"),
        ((np.zeros((1, 1)), 1.0, False, False, {}), r"shape \(1, 1\)"),
        (([[1.0], [2.0, 3.0]], 1.0, False, False, {}), "observation is a mixed list"),
        ((None, 1.0, False, False, {}), "observation is None"),
        (({"x": GOOD}, 1.0, False, False, {}), r"observation is \{'x': .* \(a dict\)"),
        ((np.array(["a"]), 1.0, False, False, {}), "observation is a ndarray .* type <U1"),
        ((GOOD, None, False, False, {}), r"reward is None .* where one number was expected"),
        ((GOOD, "1.0", False, False, {}), r"reward is '1.0' \(a str\)"),
        ((GOOD, np.zeros(2), False, False, {}), r"reward is a ndarray of shape \(2,\)"),
        ((GOOD, 1.0, None, False, {}), "'terminated' is None"),
        ((GOOD, 1.0, False, {}, {}), r"'truncated' is \{\} .* True or False was expected"),
        ((GOOD, 1.0, 2, False, {}), "'terminated' is 2"),
        ((GOOD, 1.0, False, False, "text"), r"info is 'text' .* where a dict was expected"),
        ((np.array([np.nan]), 1.0, False, False, {}), "observation 0 is nan"),
        ((np.array([-np.inf]), 1.0, False, False, {}), "observation 0 is -inf"),
        ((np.array([1e300]), 1.0, False, False, {}), "observation 0 is 1e.300, too large"),
        ((GOOD, np.nan, False, False, {}), "reward is nan"),
        ((GOOD, np.float64(np.inf), False, False, {}), "reward is inf"),
        ((GOOD, 1e30, False, False, {}), "reward is 1e.30, too large"),
    ],
)
def test_the_rest_is_refused_in_one_line(monkeypatch, returned, message):
    with pytest.raises(StepError, match=message) as error:
        one_step(monkeypatch, returned)
    assert str(error.value).startswith(f"task '{TASK}': ")
    assert str(error.value).endswith("(in step 1 of the episode from seed 3)")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (GOOD, r"reset returned a ndarray of shape .* \(observation, info\) was expected"),
        ((GOOD, 1.0), "info is 1.0"),
        ((np.zeros(3), {}), r"shape \(3,\)"),
        ((np.array([np.inf]), {}), "observation 0 is inf"),
    ],
)
def test_a_reset_is_checked_likewise(monkeypatch, returned, message):
    monkeypatch.setattr(Reach, "reset", lambda self, **_: returned)
    with pytest.raises(StepError, match=message) as error:
        make_env(TASK).reset(seed=8)
    assert str(error.value).endswith("(at the reset of the episode from seed 8)")


def test_a_part_of_a_suite_observation_is_named(monkeypatch):
    env = make_env("cartpole-swingup")
    env.reset(seed=0)
    monkeypatch.setattr(SuiteEnv, "_flat", lambda self, _: np.array([0, 0, 0, 0, np.nan]))
    with pytest.raises(StepError, match=r"observation 4 \(velocity 1\) is nan"):
        env.step(ZERO)


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), ValueError("two\nlines")])
def test_what_a_step_raises_is_one_line_with_type_and_text(monkeypatch, error):
    env = make_env(TASK)
    env.reset(seed=0)

    def fail(self, action):
        raise error

    monkeypatch.setattr(Reach, "step", fail)
    text = {"KeyError": "KeyError: 'x'", "ValueError": "ValueError: two"}
    name = type(error).__name__
    with pytest.raises(StepError, match=rf"its step raised {text.get(name, name)} \(in step 1"):
        env.step(ZERO)


def test_an_action_that_is_not_finite_does_not_reach_the_simulator():
    env = make_env(TASK)
    env.reset(seed=0)
    with pytest.raises(StepError, match="an action that is not finite"):
        env.step(np.array([np.nan], np.float32))


# --- Actions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "dtype", "message"),
    [
        ([0], [4], np.int64, "has int64 actions; this agent needs continuous ones"),
        ([0, 1], [4, 1], np.float32, r"action 1 is locked \(its bounds are \[1, 1\]\)"),
        ([-3e38], [3e38], np.float32, r"action 0 cannot be rescaled .* in float32"),
        ([-1.5e308], [1.5e308], np.float64, r"action 0 cannot be rescaled .* in float64"),
        ([0, 0], [1, 1e-45], np.float32, "action 1 cannot be rescaled"),
        ([-np.inf], [1], np.float32, "unbounded actions"),
        ([[0, 1]], [[1, 2]], np.float32, r"actions of shape \(1, 2\)"),
        ([], [], np.float32, "has no actions"),
    ],
)
def test_actions_that_cannot_be_rescaled_are_refused(monkeypatch, low, high, dtype, message):
    box = gymnasium.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    monkeypatch.setattr(Reach, "action_space", box)
    with pytest.raises(TaskError, match=message):
        make_env(TASK)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("low", "high"), [(-2.3, -0.3), (-0.7, 0.1), (1e-3, 700), (-1, 1)])
def test_the_ends_of_actions_stay_inside_the_box(monkeypatch, low, high, dtype):
    box = gymnasium.spaces.Box(low, high, (2,), dtype)
    got = []
    monkeypatch.setattr(Reach, "action_space", box)
    monkeypatch.setattr(
        Reach, "step", lambda self, action: (got.append(action), (GOOD, 0.0, 0, 0, {}))[1]
    )
    env = make_env(TASK)
    env.reset(seed=0)
    for action in ([1, -1], [-1, 1], [9, -9], [0.3, -0.999999]):
        env.step(np.array(action, np.float32))
    assert all(action.dtype == dtype and box.contains(action) for action in got)
    assert got[0] == pytest.approx([high, low], rel=1e-3, abs=1e-4)


# --- Names and constructors --------------------------------------------------------------------


def register(monkeypatch, entry_point, **settings):
    """A task of its own for an entry point."""
    monkeypatch.delitem(gymnasium.registry, "Foreign-v0", raising=False)
    gymnasium.register("Foreign-v0", entry_point, max_episode_steps=5, **settings)
    return "gym:Foreign-v0"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError(), "cannot be made: AssertionError$"),
        (FileNotFoundError(2, "No such file", "robot.xml"), r"FileNotFoundError: .*robot\.xml"),
        (TypeError("needs a terrain"), "TypeError: needs a terrain"),
        (ModuleNotFoundError("No module named 'quux'", name="quux"), "needs the module 'quux'"),
        (RuntimeError("first\nsecond"), "RuntimeError: first$"),
    ],
)
def test_any_error_of_a_constructor_is_one_line(monkeypatch, error, message):
    def make(**_):
        raise error

    with pytest.raises(TaskError, match=message):
        make_env(register(monkeypatch, make))


def test_a_class_without_spaces_is_one_line(monkeypatch):
    class Bare(gymnasium.Env):
        pass

    with pytest.raises(TaskError, match="has no observation_space: AttributeError"):
        make_env(register(monkeypatch, Bare))


def test_a_registered_time_limit_and_one_of_its_own_are_kept(monkeypatch):
    def length(env):
        env.reset(seed=0)
        for count in range(1, 2000):
            if env.step(ZERO)[3]:
                return count

    assert length(make_env(register(monkeypatch, Reach))) == 5
    gymnasium.registry["Foreign-v0"].max_episode_steps = None
    assert length(make_env("gym:Foreign-v0")) == 1000
    gymnasium.registry["Foreign-v0"].entry_point = lambda: gymnasium.wrappers.TimeLimit(Reach(), 3)
    assert length(make_env("gym:Foreign-v0")) == 3


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("cartpole_swingup", "cartpole-swingup"),
        (" Cartpole-Swingup", "cartpole-swingup"),
        ("ball_in_cup_catch", "cup-catch"),
        ("cup-catch", "cup-catch"),
        ("humanoid_CMU-run", "humanoid-cmu-run"),
        ("gym:My_Module:MyEnv-v0", "gym:My_Module:MyEnv-v0"),
    ],
)
def test_a_task_has_one_name(tmp_path, task, name):
    assert task_name(task) == name
    assert small_config(tmp_path, task=task).task == name
    assert GroupsConfig(task=task).task == BenchmarkConfig(task=task).task == name
    assert EvaluateConfig(checkpoint="x", task=task).task == name
    assert EvaluateConfig(checkpoint="x").task is None
    assert StudyConfig(tasks=[task]).tasks == [name]


def test_a_study_has_each_task_once():
    with pytest.raises(UserError, match="repeats a value"):
        StudyConfig(tasks=["cup-catch", "ball_in_cup-catch"])


def test_older_files_that_kept_another_spelling_are_of_the_same_task(tmp_path):
    saved(tmp_path / "agent", "Cartpole_Swingup", 5)
    for task in (None, "cartpole-swingup", "cartpole_swingup"):
        assert load_agent(tmp_path / "agent", task=task).task == "cartpole-swingup"
    with pytest.raises(UserError, match="is for task=cartpole-swingup, not walker-walk"):
        load_agent(tmp_path / "agent", task="walker_walk")
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"task": "cartpole_swingup"}}))
    assert RunFolder(tmp_path).settings() == {"task": "cartpole-swingup"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gym:HalfCheeta-v5", "closest are gym:HalfCheetah-v5"),
        ("gym:halfcheetah-v5", "closest are gym:HalfCheetah-v5"),
        ("Pendulum-v1", "closest are gym:Pendulum-v1"),
        ("gym:tests.synthetic:Reech-v0", "closest are gym:tests.synthetic:Reach-v0"),
        ("gym:HalfCheetah-v1", "closest are gym:HalfCheetah-v5"),
        ("gym:ALE/Breakout-v5", "namespace 'ALE'; is the package installed"),
        ("gym:my_module:X-v0", "no module 'my_module'; is the package installed"),
        ("gym:tests.nothing:X-v0", r"no module 'tests\.nothing'"),
        ("gym:", "cannot be made"),
        ("gym:a:b:c", "cannot be made"),
    ],
)
def test_suggestions_can_be_typed(task, message):
    with pytest.raises(TaskError, match=message) as error:
        make_env(task)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dt", "seconds"),
    [
        (np.float32(0.5), 0.5),
        (np.array([0.25]), 0.25),
        (1, 1.0),
        (lambda: 0.5, None),
        ("0.5", None),
        (None, None),
        (0.0, None),
        (np.nan, None),
        (True, None),
        (property(lambda self: 1 / 0), None),
    ],
)
def test_a_simulator_step_in_seconds_is_a_float_or_nothing(monkeypatch, dt, seconds):
    monkeypatch.setattr(Reach, "dt", dt, raising=False)
    found = simulator_step_seconds(make_env(TASK))
    assert found == seconds and type(found) in (float, type(None))
    json.dumps(found)


def test_foreign_attributes_of_the_same_name_are_not_ours(monkeypatch):
    monkeypatch.setattr(Reach, "observation_parts", {"x": 7}, raising=False)
    assert observation_layout(make_env(TASK)) == [{"name": "observation", "size": 1}]


def test_cheetah_run_prints_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        env = make_env("cheetah-run")
        env.reset(seed=0)
    assert not caplog.records


# --- Pictures ----------------------------------------------------------------------------------


def test_a_class_without_render_mode_plays_and_its_film_is_refused_with_what_to_add(tmp_path):
    agent = saved(tmp_path / "agent", "gym:tests.synthetic:Plain-v0")
    done = run("evaluate.py", agent, "episodes=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = one_line(run("evaluate.py", agent, "episodes=1", "video=out.mp4", cwd=tmp_path))
    assert "takes no render_mode; give its __init__ the argument render_mode=None" in line
    assert [path.name for path in tmp_path.iterdir()] == ["agent"]


def test_what_a_film_of_a_task_without_dt_needs_is_said(tmp_path):
    agent = saved(tmp_path / "agent", TASK)
    line = one_line(run("evaluate.py", agent, "episodes=1", "video=out.mp4", cwd=tmp_path))
    assert "give its class 'dt = 0.05' (in seconds), or a metadata with 'render_fps'" in line


def test_a_film_takes_its_pace_from_render_fps(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    task = "gym:tests.synthetic:Drawn-v0"
    assert frame_seconds(make_env(task)) == 1 / 25 and frame_seconds(make_env(TASK)) is None
    agent = saved(tmp_path / "agent", task)
    done = run("evaluate.py", agent, "episodes=1", "video=out.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    about = next(imageio_ffmpeg.read_frames(str(tmp_path / "out.mp4")))
    assert about["fps"] == 25


def no_text(self):
    raise AssertionError


@pytest.mark.parametrize(
    ("render", "message"),
    [
        (no_text, "cannot be drawn: AssertionError"),
        (lambda self: None, "it renders no picture"),
        (lambda self: "ansi", "its picture is str, where uint8 of shape (height, width, 3)"),
        (lambda self: np.zeros((4, 4), np.uint8), "its picture is uint8 of shape (4, 4)"),
        (lambda self: np.zeros((4, 4, 3)), "its picture is float64"),
    ],
)
def test_a_renderer_that_fails_leaves_one_line_and_no_file(tmp_path, monkeypatch, render, message):
    pytest.importorskip("imageio_ffmpeg")
    from tests.synthetic import Drawn

    monkeypatch.setattr(Drawn, "render", render)
    agent = saved(tmp_path / "agent", "gym:tests.synthetic:Drawn-v0")
    line = one_line(run("evaluate.py", agent, "episodes=1", "video=out.mp4", cwd=tmp_path))
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["agent"]


def test_a_film_whose_pictures_change_size_is_refused(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    from tdmpc_prune.envs import DisplayError

    sizes = iter([32, 32, 64])
    env = types.SimpleNamespace(
        unwrapped=None, render=lambda: np.zeros((32, next(sizes), 3), np.uint8)
    )
    with (
        pytest.raises(DisplayError, match="its pictures change from"),
        Film(tmp_path / "out.mp4", env, 0.04) as film,
    ):
        film.shoot()
        film.shoot()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    sys.platform != "linux" or bool(ctypes.util.find_library("OSMesa")),
    reason="only where OSMesa is not installed",
)
@pytest.mark.parametrize(("task", "width"), [("cartpole-swingup", 5), ("gym:Pendulum-v1", 3)])
def test_osmesa_that_is_not_installed_does_not_end_what_draws_nothing(tmp_path, task, width):
    agent = saved(tmp_path / "agent", task, width)
    done = run_process("evaluate.py", agent, "episodes=1", cwd=tmp_path, MUJOCO_GL="osmesa")
    assert done.returncode == 0, done.stderr
    if task == "cartpole-swingup":
        arguments = (agent, "episodes=1", "video=out.mp4")
        done = run_process("evaluate.py", *arguments, cwd=tmp_path, MUJOCO_GL="osmesa")
        assert "OSMesa (Debian: libosmesa6)" in one_line(done)


def test_an_unknown_gl_backend_is_one_line(tmp_path):
    done = run_process("train.py", cwd=tmp_path, MUJOCO_GL="mesa")
    assert "MUJOCO_GL" in one_line(done)


# --- Commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("step", (GOOD, 1.0, False, {}), "step returned 4 values"),
        ("reset", (np.zeros(4), {}), "observation is a ndarray of shape (4,)"),
    ],
)
def test_training_refuses_a_wrong_task_before_anything_is_written(
    tmp_path, monkeypatch, method, returned, message
):
    monkeypatch.setattr(Reach, method, lambda self, *_, **__: returned)
    assert message in one_line(run("train.py", *SMALL, cwd=tmp_path))
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_ends_in_one_line_that_names_the_episode(tmp_path, monkeypatch):
    agent = saved(tmp_path / "agent", TASK)

    def fail(self, action):
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(Reach, "step", fail)
    line = one_line(run("evaluate.py", agent, "episodes=2", "seed=40", cwd=tmp_path))
    assert "ZeroDivisionError: float division by zero (in step 1 of the episode from seed 4" in line


def test_an_agent_for_other_sizes_is_one_line(tmp_path):
    agent = saved(tmp_path / "agent", TASK, observation=4)
    line = one_line(run("evaluate.py", agent, "episodes=1", cwd=tmp_path))
    assert "takes 4 observations and gives 1 actions, but task" in line


def test_another_spelling_is_not_another_folder(tmp_path):
    small = [setting for setting in SMALL if setting not in (REACH, "env_steps=120")]
    arguments = [*small, "task=Pendulum_Swingup", "env_steps=1000", "eval_every=1000"]
    done = run("train.py", *arguments, "eval_episodes=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["pendulum-swingup"]


def test_another_envs_on_the_path_does_not_matter(tmp_path):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for script in ("train.py", "evaluate.py", "run_exported.py"):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / script, "--help"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
