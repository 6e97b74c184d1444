"""Independent measurements in several processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from joblib import Parallel, delayed
from tqdm import tqdm

from tdmpc_prune.runtime import set_threads

T = TypeVar("T")


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
    parallel = Parallel(n_jobs=processes, return_as="generator")
    results = parallel(delayed(_done)(job, threads) for job in jobs)
    return list(tqdm(results, total=count, desc=doing))


def _done(job: Callable[[], T], threads: int) -> T:
    set_threads(threads)
    return job()
