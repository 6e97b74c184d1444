"""Watching an agent: MuJoCo's viewer in a real window under Xvfb, and films."""

import contextlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from tqdm import tqdm

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.config import AgentConfig, PlannerConfig
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.deploy import playing
from tdmpc_prune.deploy.playing import Frame, _texts
from tdmpc_prune.saving.agents import load_agent, save_agent
from tests.commands import ROOT, run

pytestmark = pytest.mark.xdist_group("viewer")

needs_xvfb = pytest.mark.skipif(
    not (shutil.which("Xvfb") and sys.platform == "linux"), reason="Xvfb is not installed"
)
PLANNER = PlannerConfig(horizon=2, iterations=1, samples=16, elites=4)


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """Untrained agents, one for a suite task and one for a Gymnasium task on MuJoCo."""
    folder = tmp_path_factory.mktemp("agents")
    provenance = {"seed": 1, "env_steps": 0, "decisions": 0, "updates": 0}
    for name, task, observation, repeat in (
        ("suite", "cartpole-swingup", 5, 8),
        ("gym", "gym:InvertedPendulum-v5", 4, 1),
        ("flat", "gym:tests.synthetic:Reach-v0", 1, 1),
    ):
        widths = Widths(observation, 1, 4, (8,), (8, 8), (8, 8), (8, 8), ((8, 8),))
        model = WorldModel(widths, torch.Generator().manual_seed(0))
        agent = Agent(model, AgentConfig(planner=PLANNER), task, repeat, provenance)
        save_agent(folder / name, agent)
    return folder


@contextmanager
def xvfb():
    """A display of its own; yields its name and its process."""
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "800x600x24", "-nolisten", "tcp"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    with os.fdopen(read) as numbers:
        display = f":{numbers.readline().strip()}"
    try:
        yield display, server
    finally:
        server.kill()
        server.wait()


def find_window(connection, name="MuJoCo", seconds=60):
    """The first window whose title holds `name`, once it is there."""
    from Xlib.error import BadWindow

    def search(window):
        title = window.get_wm_name()
        if title and name in str(title):
            return window
        found = (search(child) for child in window.query_tree().children)
        return next((window for window in found if window), None)

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(BadWindow):  # the one that tries the display has just gone
            if window := search(connection.screen().root):
                return window
        time.sleep(0.1)
    raise AssertionError("no window appeared")


def press(connection, window, key):
    """Press and release a key of the real keyboard, with the window in focus."""
    from Xlib import XK, X
    from Xlib.ext import xtest

    window.set_input_focus(X.RevertToParent, X.CurrentTime)
    code = connection.keysym_to_keycode(XK.string_to_keysym(key))
    for event in (X.KeyPress, X.KeyRelease):
        xtest.fake_input(connection, event, code)
        connection.sync()
        time.sleep(0.05)


def close(connection, window):
    """What a window manager does when its cross is clicked."""
    from Xlib import X
    from Xlib.protocol.event import ClientMessage

    wish = connection.intern_atom("WM_DELETE_WINDOW")
    kind = connection.intern_atom("WM_PROTOCOLS")
    window.send_event(
        ClientMessage(window=window, client_type=kind, data=(32, [wish, X.CurrentTime, 0, 0, 0]))
    )
    connection.sync()


# Reports the viewer's state as JSON lines, while the keys are pressed from outside.
_SHOW = """
import json, sys, threading, time
from tdmpc_prune.envs import Viewer, make_env
env = make_env(sys.argv[1], 1)
env.reset(seed=0)
with Viewer(env) as viewer:
    told = None
    while viewer.is_open:
        env.step(env.action_space.sample())
        viewer.show(0.01, {"a text": "of the test"})
        state = [viewer.paused, viewer.speed, viewer.reset_wanted]
        if viewer.reset_wanted:
            viewer.reset_wanted = False
        if state != told:
            print(json.dumps(state), flush=True)
            told = state
print(viewer.frames, threading.active_count())
"""


def viewing(display, *command):
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment | {"DISPLAY": display, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_xvfb
def test_keys_reach_the_viewer_and_it_closes_cleanly():
    from Xlib.display import Display

    with xvfb() as (display, _):
        viewer = viewing(display, "-c", _SHOW, "cartpole-swingup")
        connection = Display(display)
        window = find_window(connection)
        assert json.loads(viewer.stdout.readline()) == [False, 1.0, False]
        press(connection, window, "equal")
        assert json.loads(viewer.stdout.readline()) == [False, 2.0, False]
        press(connection, window, "minus")
        assert json.loads(viewer.stdout.readline()) == [False, 1.0, False]
        press(connection, window, "Return")
        assert json.loads(viewer.stdout.readline()) == [False, 1.0, True]
        assert json.loads(viewer.stdout.readline()) == [False, 1.0, False]
        press(connection, window, "space")  # nothing is reported while it is paused …
        time.sleep(0.5)
        press(connection, window, "equal")
        time.sleep(0.5)
        press(connection, window, "space")
        assert json.loads(viewer.stdout.readline()) == [False, 2.0, False]  # … until it goes on
        close(connection, window)
        rest, errors = viewer.communicate(timeout=30)
        connection.close()
    assert viewer.returncode == 0, errors
    frames, threads = map(int, rest.split()[-2:])
    # A window's thread that outlived it crashed the interpreter's end on a busy machine.
    assert frames > 10 and threads == 1


# A command that says when a hundred frames have been drawn, however slow the drawing is.
_COUNTED = """
import runpy, sys
from tdmpc_prune.envs import Viewer
show = Viewer.show
def counted(self, *arguments):
    show(self, *arguments)
    if self.frames == 100:
        print("a hundred", file=sys.stderr, flush=True)
Viewer.show = counted
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@needs_xvfb
@pytest.mark.parametrize("agent", ["suite", pytest.param("gym", marks=pytest.mark.slow)])
def test_an_agent_plays_a_hundred_frames_in_the_viewer(agents, agent):
    from Xlib.display import Display

    with xvfb() as (display, _):
        script = str(ROOT / "scripts/evaluate.py")
        arguments = [script, f"checkpoint={agents / agent}", "viewer=true"]
        viewer = viewing(display, "-c", _COUNTED, *arguments)
        connection = Display(display)
        window = find_window(connection)
        patience = threading.Timer(120, viewer.kill)
        patience.start()
        said = iter(viewer.stderr.readline, "")
        earlier = list(itertools.takewhile("a hundred\n".__ne__, said))
        patience.cancel()
        assert viewer.poll() is None, earlier
        press(connection, window, "Return")
        time.sleep(2)
        close(connection, window)
        out, errors = viewer.communicate(timeout=60)
        connection.close()
    assert viewer.returncode == 0, errors
    lines = out.splitlines()
    assert int(lines[-1].split()[0]) >= 100, out
    assert len(lines) >= 3  # two episodes and the count


# Deciding takes longer than the time that is shown.
_SLOW = """
import time
from tdmpc_prune.envs import Viewer, make_env
env = make_env("cartpole-swingup", 1)
env.reset(seed=0)
shown = []
with Viewer(env) as viewer:
    set_texts = viewer._handle.set_texts
    viewer._handle.set_texts = lambda texts: (shown.append(texts), set_texts(texts))
    for _ in range(60):
        env.step(env.action_space.sample())
        time.sleep(0.04)
        viewer.show(0.01, {"a text": "of the test"})
    speed = shown[-1][3].splitlines()[-1]
    print(viewer.real_speed, shown[-1][1].name, speed, flush=True)
"""


@needs_xvfb
def test_the_speed_shown_is_the_real_one():
    with xvfb() as (display, _):
        out, errors = viewing(display, "-c", _SLOW).communicate(timeout=120)
    assert out, errors
    measured, place, shown = out.strip().split(" ", 2)
    assert place == "mjGRID_BOTTOMRIGHT"  # F1's help fills the left
    assert 0.001 < float(measured) <= 0.26 and shown == f"1 x (real {float(measured):.2g} x)"


def test_few_words_are_shown_beside_the_robot():
    texts = _texts(Frame(1000, 987.65, 103.26, False), 0.01, 80)
    assert texts == {"return": "987.6 after 10.0 s", "decision": "103.3 of 80 ms"}


def test_filming_says_what_takes_long(agents, tmp_path, monkeypatch):
    if not can_draw():
        pytest.skip("nothing can be drawn offscreen here (no EGL)")
    shown = io.StringIO()
    bar = {"disable": False, "file": shown, "mininterval": 0}
    monkeypatch.setattr(playing, "tqdm", lambda **given: tqdm(**given | bar))
    playing.record(load_agent(agents / "gym"), 1, 0, tmp_path / "out.mp4")
    pattern = r"filming episode 1 of 1: [1-9].*deciding \d+ s, drawing \d+ s"
    assert re.search(pattern, shown.getvalue())


@needs_xvfb
def test_a_display_that_vanishes_ends_it_with_one_line(agents):
    from Xlib.display import Display

    with xvfb() as (display, server):
        script = str(ROOT / "scripts/evaluate.py")
        viewer = viewing(display, script, f"checkpoint={agents / 'suite'}", "viewer=true")
        connection = Display(display)
        find_window(connection)
        time.sleep(2)
        connection.close()
        server.send_signal(signal.SIGKILL)
        _, errors = viewer.communicate(timeout=60)
    assert viewer.returncode == 1
    assert errors.strip() == "error: the display has gone; the viewer was closed"


@pytest.mark.parametrize("display", ["", ":4711"])
def test_no_display_is_one_line_that_names_video(agents, tmp_path, monkeypatch, display):
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    done = run("evaluate.py", f"checkpoint={agents / 'suite'}", "viewer=true", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "no" in lines[0] and "video=out.mp4" in lines[0], done.stderr


def can_draw():
    script = (
        "from tdmpc_prune.envs import make_env; e = make_env('cartpole-swingup', 1, 'rgb_array'); "
    )
    script += "e.reset(); e.render()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    return done.returncode == 0


# 500 frames of the suite take half a minute to draw without a GPU: with -m slow.
@pytest.mark.parametrize("agent", [pytest.param("suite", marks=pytest.mark.slow), "gym"])
def test_a_film_shows_the_whole_episode(agents, agent, tmp_path):
    if not can_draw():
        pytest.skip("nothing can be drawn offscreen here (no EGL)")
    import imageio_ffmpeg

    film = tmp_path / "out.mp4"
    arguments = [f"checkpoint={agents / agent}", "episodes=1", f"video={film}"]
    done = run("evaluate.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    about = next(imageio_ffmpeg.read_frames(str(film)))
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(film))
    if agent == "suite":  # 10 s at 100 simulator steps a second, each second one filmed
        assert (frames, about["fps"], seconds) == (500, 50.0, pytest.approx(10.0, abs=0.1))
        assert about["size"] == (640, 480)
        unfilmed = run("evaluate.py", *arguments[:2], cwd=tmp_path).stdout
        said = [line for line in unfilmed.splitlines() if line.startswith("per episode")]
        assert said and said[0] in done.stdout  # it is the same episode
    else:
        assert frames > 1


def test_a_film_that_cannot_be_finished_is_not_there(agents, tmp_path):
    """For real: the system refuses files beyond a kilobyte, as a full disk would."""
    if not can_draw():
        pytest.skip("nothing can be drawn offscreen here (no EGL)")
    script = str(ROOT / "scripts/evaluate.py")
    arguments = [f"checkpoint={agents / 'gym'}", "episodes=1", "video=out.mp4"]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout
    assert "error: video=out.mp4 cannot be written" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("agent", "arguments", "message"),
    [
        ("suite", ["video=nowhere/out.mp4"], "video=nowhere/out.mp4 cannot be written"),
        ("suite", ["video=out.avi"], "video=out.avi must end in .mp4"),
        ("suite", ["viewer=true", "video=out.mp4"], "give video= or save= without it"),
        ("suite", ["task=walker-walk"], "is for task=cartpole-swingup, not walker-walk"),
        ("suite", ["save=taken"], "'taken' exists already"),
        ("suite", ["play_parent=true"], "names no dense agent that is there"),
        ("flat", ["video=out.mp4"], "does not say how long a simulator step is"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_left(agents, tmp_path, agent, arguments, message):
    (tmp_path / "taken").mkdir()
    done = run("evaluate.py", f"checkpoint={agents / agent}", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_without_egl_or_the_extra_a_film_is_refused(agents, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    arguments = [f"checkpoint={agents / 'suite'}", "episodes=1", "video=out.mp4"]
    done = run("evaluate.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "install EGL" in done.stderr, done.stderr
    (tmp_path / "imageio_ffmpeg.py").write_text("raise ImportError")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pathlib import Path; from tdmpc_prune.envs import DisplayError, Film\n"
        "try:\n    Film(Path('out.mp4'), None, 0.1)\nexcept DisplayError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "pip install -e '.[video]'" in done.stdout, done.stderr  # on no index
    assert not (tmp_path / "out.mp4").exists()
