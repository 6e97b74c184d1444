"""The machine that a command runs on: its device, threads, processes, and what is installed.

PyTorch is imported only where it is needed: a command that is refused has no use for it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tdmpc_prune.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → a device.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch finds no CUDA device; use device=cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def set_threads(threads: int) -> None:
    """Let PyTorch use so many CPU threads.

    The commands' default is 1: the networks are small, and OpenMP's threads wait for each other at
    a barrier after every operation, which takes many times longer than the operation itself when
    another process has one of the cores.
    """
    import torch

    torch.set_num_threads(threads)


def measure_all(
    jobs: Iterable[Callable[[], T]], count: int, processes: int, threads: int, doing: str
) -> list[T]:
    """What each job returns, in order.

    Args:
        jobs: can be pickled, results too; made one after another while earlier ones run.
        count: of jobs.
        processes: that work at the same time; one works here.
        threads: CPU threads of each process.
        doing: for the progress bar.
    """
    from joblib import Parallel, delayed
    from tqdm import tqdm

    parallel = Parallel(n_jobs=processes, return_as="generator")
    results = parallel(delayed(_done)(job, threads) for job in jobs)
    return list(tqdm(results, total=count, desc=doing, disable=None))


def _done(job: Callable[[], T], threads: int) -> T:
    set_threads(threads)
    return job()


def machine() -> str:
    """The processor's name, for figures that depend on it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ("tdmpc-prune", "torch", "numpy", "gymnasium", "dm-control", "mujoco")
    python = {"python": platform.python_version()}
    return python | {package: _version(package) for package in packages}


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of this checkout, with "-dirty" if files differ from it; else the version."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        ask = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found = subprocess.run([*ask, "--dirty"], capture_output=True, text=True, check=True)
            return found.stdout.strip()
    return versions()["tdmpc-prune"]
