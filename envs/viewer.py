"""MuJoCo's window on an environment: opening it, its keys, and its pace."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import warnings
from collections import deque

import gymnasium
from tdmpc_prune.envs.rendering import DisplayError

SPEEDS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # times real time
KEYS = "Space pauses, + and - change the speed, Enter starts a new episode"
_SPACE, _ENTER = 32, 257
_FASTER, _SLOWER = (61, 334), (45, 333)  # on the main block, on the keypad
_LATE = 0.25  # s; a frame later than this does not make the next ones hurry
_LONGEST_GAP = 0.1  # s between frames, however slow drawing is
_IDLE = 0.02  # s between frames while paused
_CLOSING = 10.0  # s that the window may take to close
_MEASURED = 1.0  # s over which the real speed is measured


class Viewer:
    """A window that shows an environment in real time, simulator step by simulator step.

    `paused`, `speed` and `reset_wanted` follow the keys; the program may set them, too.
    """

    def __init__(self, env: gymnasium.Env):
        """Open the window.

        Args:
            env: on MuJoCo; the window looks at its `unwrapped.model` and `.data`.

        Raises:
            DisplayError: there is no display, or the environment does not run on MuJoCo.
        """
        _check_display()
        from mujoco import MjData, mjtCamera, viewer

        inner = env.unwrapped
        if not isinstance(getattr(inner, "data", None), MjData):
            raise DisplayError(
                "the viewer shows MuJoCo tasks only, and this task is none; "
                "video=out.mp4 records whatever a task can render"
            )
        self.paused = False
        self.speed = 1.0
        self.reset_wanted = False
        self.frames = 0
        self.real_speed: float | None = None  # measured; None while there is nothing to measure
        self._due = self._shown = time.perf_counter()
        self._simulated = 0.0  # s so far
        self._pace: deque[tuple[float, float]] = deque()  # (time, simulated) of the latest frames
        others = set(threading.enumerate())
        self._handle = viewer.launch_passive(
            inner.model, inner.data, key_callback=self._key, show_left_ui=False, show_right_ui=False
        )
        self._drawing = set(threading.enumerate()) - others  # the window's own threads

        if inner.model.ncam:  # the task's own view; Esc frees the camera
            self._handle.cam.type = mjtCamera.mjCAMERA_FIXED
            self._handle.cam.fixedcamid = 0

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_) -> None:
        # A thread that still draws while simulator or interpreter are torn down ends in a crash.
        self._handle.close()
        for thread in self._drawing:
            thread.join(_CLOSING)

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed the window."""
        return self._handle.is_running()

    def show(self, seconds: float, texts: dict[str, str]) -> None:
        """Show the present state when its time has come; while paused, wait here.

        Frames are dropped while drawing is too slow to keep pace.

        Args:
            seconds: simulated time since the frame before.
            texts: name → value, in a corner of the window; few and short, it hides what is there.
        """
        self._simulated += seconds
        now = time.perf_counter()
        self._due = max(self._due + seconds / self.speed, now - _LATE)
        if now > self._due and now < self._shown + _LONGEST_GAP:
            return
        time.sleep(max(0.0, self._due - now))
        self._sync(texts)
        while self.paused and not self.reset_wanted and self.is_open:
            time.sleep(_IDLE)
            self._pace.clear()
            self._sync(texts)
            self._due = time.perf_counter()

    def _sync(self, texts: dict[str, str]) -> None:
        from mujoco import mjtFontScale, mjtGridPos

        self._measure()
        real = "" if self.real_speed is None else f" (real {self.real_speed:.2g} x)"
        speed = "paused (Space)" if self.paused else f"{self.speed:g} x{real}"
        shown = texts | {"speed": speed}
        # Small and low: the robot is in the middle, and F1 fills the left with MuJoCo's keys.
        place = (mjtFontScale.mjFONTSCALE_100, mjtGridPos.mjGRID_BOTTOMRIGHT)
        self._handle.set_texts((*place, "\n".join(shown), "\n".join(shown.values())))
        self._handle.sync()
        self._shown = time.perf_counter()
        self.frames += 1

    def _measure(self) -> None:
        """How fast simulated time really went by of late."""
        now = time.perf_counter()
        self._pace.append((now, self._simulated))
        while now - self._pace[0][0] > _MEASURED and len(self._pace) > 2:
            self._pace.popleft()
        began, simulated = self._pace[0]
        known = now > began and self._simulated > simulated
        self.real_speed = (self._simulated - simulated) / (now - began) if known else None

    def _key(self, key: int) -> None:
        """Called by the window's own thread."""
        place = SPEEDS.index(self.speed) if self.speed in SPEEDS else SPEEDS.index(1.0)
        if key == _SPACE:
            self.paused = not self.paused
        elif key == _ENTER:
            self.reset_wanted = True
        elif key in _FASTER:
            self.speed = SPEEDS[min(place + 1, len(SPEEDS) - 1)]
        elif key in _SLOWER:
            self.speed = SPEEDS[max(place - 1, 0)]


def _check_display() -> None:
    """Refuse a machine without a display, where MuJoCo's viewer would wait for ever."""
    import glfw

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GLFW's reasons come as warnings
        window = None
        if glfw.init():
            glfw.window_hint(glfw.VISIBLE, False)
            window = glfw.create_window(16, 16, "", None, None)
            glfw.default_window_hints()
        if window:
            glfw.destroy_window(window)
        glfw.terminate()
    if not window:
        raise DisplayError(
            "viewer=true needs a display with OpenGL, and there is none here; "
            "video=out.mp4 records the episodes instead"
        )
    if sys.platform == "linux":
        _end_with_the_display()


def _end_with_the_display() -> None:
    """When the X server goes away, end with one line; Xlib would end the process with its own."""
    with contextlib.suppress(OSError):
        x11 = ctypes.CDLL("libX11.so.6")
        x11.XSetIOErrorHandler(_display_vanished)


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
def _display_vanished(_display) -> int:
    print("error: the display has gone; the viewer was closed", file=sys.stderr, flush=True)
    os._exit(1)  # Xlib allows nothing else here
