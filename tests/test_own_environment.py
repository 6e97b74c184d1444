"""An environment in a file of one's own: used for everything, reported, or refused in one line."""

import sys
from pathlib import Path

import pytest
from tdmpc_prune.envs import TaskError, default_action_repeat, make_env, task_name

from tdmpc_prune import load
from tests.commands import SMALL, run

ARM = '''
import gymnasium
import numpy as np
from helper import GAIN


class Arm(gymnasium.Env):
    """A mass on a rail that is to be held in the middle."""

    dt = 0.05
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.uniform(-1, 1, 2), 0
        return self.state.copy(), {}

    def step(self, action):
        self.steps += 1
        self.state += self.dt * np.array([self.state[1], GAIN * action[0]])
        return self.state.copy(), -float(abs(self.state[0])), False, self.steps >= 20, {}

    def render(self):
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, int(np.clip(32 + 20 * self.state[0], 0, 63))] = 255
        return picture
'''
SETTINGS = [s for s in SMALL if not s.startswith("task=")]


def write(folder, name="my_env.py", text=ARM):
    (folder / name).write_text(text)
    (folder / "helper.py").write_text("GAIN = 1.0\n")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Each test has its own `helper`, and leaves the path as it was."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("helper", None)


def test_it_trains_prunes_evaluates_films_and_exports(tmp_path, undrawn):
    write(tmp_path)
    prune = ["prune=bayesian", "prune.steps=1", "prune.sparsity=0.4", "prune.min_width=2"]
    prune += ["prune.round_to=1", "prune.max_return_drop=10", "prune.eval_episodes=1"]
    task = "task=file:my_env.py:Arm"
    done = run("train.py", task, *SETTINGS, *prune, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in (
        "observations    2 (observation 2) between -inf and inf",
        "actions         1, rescaled from [-1, 1] to [-2, 2]",
        "simulator step  0.05 s; 1 per decision, control period 0.05 s",
        "time limit      1000 simulator steps, if it does not end before",
        "seeding         repeats",
    ):
        assert line in done.stdout
    done = run("evaluate.py", "run", "episodes=1", cwd=tmp_path)
    assert done.returncode == 0 and "return (mean ± std)" in done.stdout, done.stderr
    pytest.importorskip("imageio_ffmpeg")
    done = run("evaluate.py", "run", "episodes=1", "video=out.mp4", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out.mp4").stat().st_size, done.stderr
    pytest.importorskip("onnxruntime")
    done = run("export.py", "run", "part=policy", "out=policy.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    controller = load(tmp_path / "run", actuator_units=True)
    assert abs(controller([0.5, 0.0])) <= 2 and controller.statistics.control_period_ms == 50


def test_render_mode_is_passed_only_for_a_film(tmp_path, monkeypatch):
    plain = ARM.replace("    def __init__(self, render_mode=None):", "    def __init__(self):")
    write(tmp_path, text=plain.replace("self.render_mode = render_mode", "pass"))
    monkeypatch.chdir(tmp_path)
    env = make_env("file:my_env.py:Arm")
    assert env.reset(seed=0)[0].shape == (2,)
    with pytest.raises(TaskError, match="cannot be drawn: 'Arm' takes no render_mode; give it"):
        make_env("file:my_env.py:Arm", render_mode="rgb_array")


def test_a_function_makes_one_and_its_time_limit_counts(tmp_path, monkeypatch):
    limited = "\n\ndef short():\n    return gymnasium.wrappers.TimeLimit(Arm(), 3)\n"
    write(tmp_path, text=ARM + limited)
    monkeypatch.chdir(tmp_path)
    env = make_env("file:./my_env.py:short")
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[3] for _ in range(3)]
    assert ends == [False, False, True]
    assert make_env(f"file:{tmp_path}/my_env.py:Arm").action_space.shape == (1,)
    assert default_action_repeat("file:my_env.py:short") == 1


def test_one_task_has_one_name():
    assert task_name("file:./a/../my_env.py:Arm") == "file:my_env.py:Arm"
    assert task_name("cartpole_swingup") == task_name("Cartpole-Swingup") == "cartpole-swingup"


def test_the_current_folder_can_be_imported(tmp_path):
    registered = "\n\ngymnasium.register('Arm-v0', Arm, max_episode_steps=20)\n"
    write(tmp_path, "my_tasks_here.py", ARM + registered)
    few = ["eval_every=120", "eval_episodes=1"]
    done = run("train.py", "task=gym:my_tasks_here:Arm-v0", *SETTINGS, *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_seeding_that_does_not_repeat_is_said(tmp_path):
    write(tmp_path, text=ARM.replace("self.np_random.uniform", "np.random.uniform"))
    few = ["eval_every=120", "eval_episodes=1"]
    done = run("train.py", "task=file:my_env.py:Arm", *SETTINGS, *few, cwd=tmp_path)
    assert done.returncode == 0 and "seeding         does not repeat" in done.stdout


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("file:my_env.py:Amr", "has no class or function 'Amr'; give task=file:my_env.py:Arm"),
        ("file:my_env.py", "does not say what makes the environment; give task=file:my_env.py:Arm"),
        ("file:nope.py:Arm", "there is no file 'nope.py' in"),
        ("file:notes.txt:Arm", "'notes.txt' is no Python file"),
        ("file:broken.py:Arm", "cannot be made: SyntaxError"),
        ("file:lacking.py:Arm", "it needs the module 'not_there'; is it installed?"),
        ("file:other.py:number", "'number' gives a int, and a gymnasium.Env is needed"),
        ("file:other.py:fails", "cannot be made: OSError: no port"),
        ("file:other.py:CONSTANT", "has no class or function 'CONSTANT'"),
        ("gym:not_there:Arm-v0", "there is no module 'not_there'"),
        ("HalfCheetah-v5", "the closest are gym:HalfCheetah-v5"),
    ],
)
def test_what_cannot_be_made_is_one_line(tmp_path, task, message):
    write(tmp_path)
    for name, text in {
        "notes.txt": "",
        "broken.py": "def\n",
        "lacking.py": "import not_there\n",
        "other.py": "CONSTANT = 1\ndef number(): return 1\ndef fails(): raise OSError('no port')\n",
    }.items():
        (tmp_path / name).write_text(text)
    check_refused(tmp_path, task, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Box(-2.0, 2.0, (1,))", "Box(-np.inf, np.inf, (1,))", "unbounded actions; give it finite"),
        ("Box(-2.0, 2.0, (1,))", "Discrete(3)", "has Discrete actions"),
        ("Box(-np.inf, np.inf, (2,))", "Dict({})", "has Dict observations"),
        ("return self.state.copy(), {}", "return np.full(2, np.nan), {}", "is nan"),
        ("abs(self.state[0])), False", "np.nan), False", "its reward is nan"),
        (
            "-float(abs(self.state[0])), False",
            "0.0, True",
            "in the first decision of every episode",
        ),
        ("(2,))", "(3,))", "where numbers of shape (3,) were expected"),
        ("    action_space =", "    actions =", "has no action_space"),
    ],
)
def test_what_no_agent_can_act_in_is_one_line(tmp_path, old, new, message):
    assert old in ARM
    write(tmp_path, text=ARM.replace(old, new))
    check_refused(tmp_path, "file:my_env.py:Arm", message)


def check_refused(folder, task, message):
    done = run("train.py", f"task={task}", *SETTINGS, cwd=folder)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and message in line
    assert not Path(folder / "runs").exists()


@pytest.mark.parametrize("type", ["np.float64", "np.int64"])
def test_numbers_of_another_type_are_converted(tmp_path, monkeypatch, type):
    text = ARM.replace("return self.state.copy(), {}", f"return self.state.astype({type}), {{}}")
    write(tmp_path, text=text)
    monkeypatch.chdir(tmp_path)
    assert make_env("file:my_env.py:Arm").reset(seed=0)[0].dtype == "float32"
