"""Pictures of environments: the OpenGL backend that draws them, and films."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np
from tdmpc_prune.envs.errors import DisplayError, told

FRAMES_PER_SECOND = 50  # of a film, at most
_OFFSCREEN = {"egl": "EGL", "osmesa": "OSMesa"}  # value of MUJOCO_GL → the library behind it


def choose_gl_backend() -> None:
    """On a Linux machine without a display, render offscreen through EGL where it is installed.

    MuJoCo must not have been imported yet. A `MUJOCO_GL` that the user has set is left alone, and
    so is a machine with a display; but a backend that is not installed is switched off, because
    MuJoCo would not even be imported with it, and most episodes draw nothing.
    """
    if sys.platform != "linux":
        return
    if "MUJOCO_GL" in os.environ:
        library = _OFFSCREEN.get(os.environ["MUJOCO_GL"].strip().lower())
        if library and not _is_installed(library):
            os.environ["MUJOCO_GL"] = "disable"
        return
    if os.environ.get("WAYLAND_DISPLAY") or (os.environ.get("DISPLAY") and _x_server_answers()):
        return
    os.environ["MUJOCO_GL"] = "egl" if _is_installed("EGL") else "disable"


def _is_installed(library: str) -> bool:
    if ctypes.util.find_library(library):
        return True
    with contextlib.suppress(OSError):  # on LD_LIBRARY_PATH alone
        return bool(ctypes.CDLL(f"lib{library}.so"))
    return False


def _x_server_answers() -> bool:
    """Whether there is an X server at `DISPLAY`, which outlives the session that set it."""
    try:
        x11 = ctypes.CDLL("libX11.so.6")
    except OSError:
        return False
    x11.XOpenDisplay.restype = ctypes.c_void_p
    display = x11.XOpenDisplay(None)
    if display:
        x11.XCloseDisplay(ctypes.c_void_p(display))
    return bool(display)


class Film:
    """An MP4 film of an environment; a context. It is at `path` once the context ends well.

    Until then, and if it does not end well, nothing is there.
    """

    def __init__(self, path: Path, env: gymnasium.Env, seconds_per_frame: float):
        """Begin a film.

        Args:
            path: where to; its suffix is .mp4.
            env: made with `render_mode="rgb_array"`.
            seconds_per_frame: simulated time between two calls of `shoot`.

        Raises:
            DisplayError: it cannot be written there, or nothing can be drawn.
        """
        try:
            import imageio_ffmpeg
        except ImportError as error:
            raise DisplayError(
                f"video= needs imageio-ffmpeg, which is optional ({told(error)}); in the checkout: "
                f"pip install -e '.[video]'"
            ) from error
        if path.suffix != ".mp4":
            raise DisplayError(f"video={path} must end in .mp4")
        self._path, self._part = path, path.with_name(f".{path.stem}.part.mp4")
        self._env = env
        # Of more frames than the film may have, it takes each n-th.
        self._every = max(1, round(1 / (FRAMES_PER_SECOND * seconds_per_frame)))
        self._calls = 0
        try:
            self._part.touch()  # before anything is played
            picture = self._draw()
            self._shape = picture.shape
            height, width, _ = self._shape
            self._writer = imageio_ffmpeg.write_frames(
                str(self._part),
                (width, height),
                fps=1 / (seconds_per_frame * self._every),
                macro_block_size=2,
                ffmpeg_log_level="error",
            )
            self._writer.send(None)
        except BaseException as error:
            self._leave_nothing()
            if isinstance(error, OSError):
                raise self._refusal(error) from error
            raise

    def __enter__(self) -> Film:
        return self

    def __exit__(self, failed, *_) -> None:
        try:
            self._writer.close()
            if failed is None:
                self._check()
                os.replace(self._part, self._path)
        except OSError as error:
            raise self._refusal(error) from error
        finally:
            self._leave_nothing()

    def _leave_nothing(self) -> None:
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _check(self) -> None:
        """FFmpeg does not say whether it could finish the file. Raises OSError."""
        import imageio_ffmpeg

        wanted = -(-self._calls // self._every)
        try:
            frames, _ = imageio_ffmpeg.count_frames_and_secs(str(self._part))
        except RuntimeError as error:
            raise OSError("FFmpeg could not finish it (is the disk full?)") from error
        if frames < wanted:
            raise OSError(f"only {frames} of {wanted} frames were written (is the disk full?)")

    def _refusal(self, error: OSError) -> DisplayError:
        reason = error.strerror or told(error)
        return DisplayError(f"video={self._path} cannot be written: {reason}")

    def shoot(self) -> None:
        """Take the present state."""
        if self._calls % self._every == 0:
            try:
                self._writer.send(np.ascontiguousarray(self._next_picture()))
            except OSError as error:
                raise self._refusal(error) from error
        self._calls += 1

    def _next_picture(self) -> np.ndarray:
        picture = self._draw()
        if picture.shape != self._shape:
            raise DisplayError(
                f"the task cannot be drawn: its pictures change from {self._shape} to "
                f"{picture.shape}"
            )
        return picture

    def _draw(self) -> np.ndarray:
        """A picture, uint8 `[height, width, 3]`."""
        if os.environ.get("MUJOCO_GL") == "disable" and _runs_on_mujoco(self._env):
            raise DisplayError(
                "nothing can be drawn here: install EGL (Debian: libegl1 libgl1-mesa-dri), or "
                "OSMesa (Debian: libosmesa6) and set MUJOCO_GL=osmesa"
            )
        try:
            picture = self._env.render()
        except Exception as error:  # every backend has errors of its own
            raise DisplayError(f"the task cannot be drawn: {told(error)}") from error
        if picture is None:
            raise DisplayError("the task cannot be drawn: it renders no picture")
        shape, dtype = getattr(picture, "shape", ()), getattr(picture, "dtype", None)
        if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
            came = f"{dtype} of shape {shape}" if dtype is not None else type(picture).__name__
            raise DisplayError(
                f"the task cannot be drawn: its picture is {came}, where uint8 of shape "
                f"(height, width, 3) was expected"
            )
        return picture


def _runs_on_mujoco(env: gymnasium.Env) -> bool:
    """Whether drawing needs OpenGL; others may call something else their `data`."""
    from mujoco import MjData

    return isinstance(getattr(env.unwrapped, "data", None), MjData)
