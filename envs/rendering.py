"""Which OpenGL backend MuJoCo renders with. It must be chosen before MuJoCo is first imported."""

from __future__ import annotations

import ctypes.util
import os
import sys


def choose_gl_backend() -> None:
    """On a Linux machine without a display, render offscreen through EGL where it is installed.

    A `MUJOCO_GL` that the user has set is left alone, and so is a machine with a display.
    """
    if sys.platform != "linux" or "MUJOCO_GL" in os.environ:
        return
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disable"
