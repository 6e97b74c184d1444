"""Compiling planner and learner for this machine at their first use, into a cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("planner.h", "planner.c"))
LEARNER = (*SOURCES, Path(__file__).with_name("learner.c"))  # the last of them is compiled
STRICT = ("-std=c99", "-ffp-contract=off")  # what its numbers depend on
_FAST = ("-O3", "-march=native", "-mprefer-vector-width=512")
_PLAIN = ("-O3",)  # for compilers that do not know the others
_SECONDS = 120  # that a compiler may take


class Unavailable(Exception):
    """Why there is nothing native here: a clause that follows "because"."""


def compiler() -> str:
    """The machine's C compiler: CC, or what is there of cc, gcc and clang.

    Raises:
        Unavailable: there is none.
    """
    wanted = os.environ.get("CC")
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        if found := shutil.which(name):
            return found
    raise Unavailable(f"there is no C compiler ({f'CC={wanted}' if wanted else 'cc, gcc, clang'})")


def cache_folder() -> Path:
    """Where what was compiled lies: XDG_CACHE_HOME, or .cache in the home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tdmpc_prune"


def processor() -> str:
    """What tells processors apart for which a build must differ: their name and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("model name", "flags", "Features", "CPU part")
    own = dict.fromkeys(line for line in lines if line.startswith(told))
    return "\n".join([platform.machine(), *own])


@functools.cache
def library(
    check: Callable[[ctypes.CDLL], str | None], sources: tuple[Path, ...] = SOURCES
) -> ctypes.CDLL:
    """The compiled planner or learner, from the cache or made now.

    Args:
        check: told of a new one before it is taken into the cache; what is wrong with it, or None.
        sources: of which it follows; the last is compiled.

    Raises:
        Unavailable: there is no compiler, or what it makes does not work.
    """
    name = compiler()
    version = _run([name, "--version"])
    told = "\0".join([name, version, *STRICT, *_FAST, processor()])
    read, what = b"".join(path.read_bytes() for path in sources), sources[-1].stem
    key = hashlib.sha256(told.encode() + read).hexdigest()[:24]
    try:
        target = cache_folder() / f"{what}-{key}.so"
        if target.exists():
            with contextlib.suppress(OSError):  # damaged: it is made again
                return ctypes.CDLL(str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{what}-", dir=target.parent)
    except (OSError, RuntimeError):  # no home folder, or not to be written to
        target, folder = None, tempfile.TemporaryDirectory(prefix=f".{what}-")
    with folder as made:
        new = Path(made) / f"{what}.so"
        _compile(name, sources[-1], new)
        try:
            loaded = ctypes.CDLL(str(new))
        except OSError as error:
            raise Unavailable(f"what {name} made cannot be loaded ({error})") from error
        if wrong := check(loaded):
            raise Unavailable(f"what {name} made {wrong}")
        if target:
            os.replace(new, target)
    return loaded


def _compile(name: str, source: Path, target: Path) -> None:
    for flags in (_FAST, _PLAIN):
        try:
            _run([name, *STRICT, *flags, "-fPIC", "-shared", str(source), "-o", str(target)])
            return
        except Unavailable as error:
            failure = error
    raise failure


def _run(command: list[str]) -> str:
    """What a command prints. Raises Unavailable: it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot be run ({error})") from error
    if done.returncode:
        said = (done.stderr.strip() or "it says nothing").splitlines()[0]
        raise Unavailable(f"{command[0]} fails: {said}")
    return done.stdout
