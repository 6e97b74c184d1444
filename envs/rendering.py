"""Pictures of environments: the OpenGL backend that draws them, and films."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np

FRAMES_PER_SECOND = 50  # of a film, at most


class DisplayError(RuntimeError):
    """Nothing can be shown or drawn here, and why."""


def choose_gl_backend() -> None:
    """On a Linux machine without a display, render offscreen through EGL where it is installed.

    MuJoCo must not have been imported yet. A `MUJOCO_GL` that the user has set is left alone, and
    so is a machine with a display.
    """
    if sys.platform != "linux" or "MUJOCO_GL" in os.environ:
        return
    if os.environ.get("WAYLAND_DISPLAY") or (os.environ.get("DISPLAY") and _x_server_answers()):
        return
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disable"


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
                "video= needs imageio-ffmpeg, which is optional: pip install 'tdmpc-prune[video]' "
                "(in a checkout: pip install -e '.[video]')"
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
        except OSError as error:
            raise self._refusal(error) from error
        except DisplayError:
            self._part.unlink()
            raise
        height, width, _ = picture.shape
        self._writer = imageio_ffmpeg.write_frames(
            str(self._part),
            (width, height),
            fps=1 / (seconds_per_frame * self._every),
            macro_block_size=2,
            ffmpeg_log_level="error",
        )
        self._writer.send(None)

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
        reason = error.strerror or str(error).strip().splitlines()[0]
        return DisplayError(f"video={self._path} cannot be written: {reason}")

    def shoot(self) -> None:
        """Take the present state."""
        if self._calls % self._every == 0:
            try:
                self._writer.send(np.ascontiguousarray(self._draw()))
            except OSError as error:
                raise self._refusal(error) from error
        self._calls += 1

    def _draw(self) -> np.ndarray:
        on_mujoco = hasattr(self._env.unwrapped, "data")  # others need no OpenGL
        if on_mujoco and os.environ.get("MUJOCO_GL") == "disable":
            raise DisplayError(
                "nothing can be drawn here: install EGL (Debian: libegl1 libgl1-mesa-dri), "
                "or set MUJOCO_GL=osmesa"
            )
        try:
            picture = self._env.render()
        except Exception as error:  # every backend has errors of its own
            reason = str(error).strip().splitlines()[0]
            raise DisplayError(f"the task cannot be drawn: {reason}") from error
        if picture is None:
            raise DisplayError("the task cannot be drawn: it renders no picture")
        return picture
