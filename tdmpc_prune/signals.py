"""Stopping a long job in an orderly way when SIGINT or SIGTERM arrives."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tdmpc_prune.errors import RunError


class Stopped(RunError):
    """A job was asked to stop, and its state is saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """As a context: remembers the first signal that arrives; a second one ends at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._handlers: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.number = number
        print("\nsaving; once more to give up at once", file=sys.stderr)


@dataclass
class SharedStop:
    """A request to stop that all processes of a sweep see, in a folder; true if there is one."""

    folder: Path
    number: int | None = None  # of the signal that came to the process that opened it

    def __bool__(self) -> bool:
        return (self.folder / "stop").exists()

    def request(self) -> None:
        """Let no further job begin."""
        with suppress(OSError):  # on another machine there is no such folder
            (self.folder / "stop").touch()

    @contextmanager
    def working(self, here: bool) -> Iterator[None]:
        """Around a job: a signal ends it, but where it saves first (`StopRequest`).

        Args:
            here: the job runs in the process that opened this, which has its own handlers.
        """
        numbers, note = (signal.SIGINT, signal.SIGTERM), self.folder / str(os.getpid())
        before = {number: signal.signal(number, _end) for number in numbers}
        if not here:
            with suppress(OSError):
                note.touch()
        try:
            yield
        finally:
            note.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)
            if not here:  # an idle process that Ctrl-C ends would take busy ones with it
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _remember(self, number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.number = number
        self.request()
        print("\nstopping the sweep; once more to give up at once", file=sys.stderr)
        if number == signal.SIGTERM:  # a terminal's Ctrl-C reaches all processes by itself
            for note in self.folder.glob("[0-9]*"):
                with suppress(ProcessLookupError):
                    os.kill(int(note.name), number)


def _end(number: int, _frame) -> None:
    raise SystemExit(128 + number)


@contextmanager
def shared_stop() -> Iterator[SharedStop]:
    """As long as it lasts, the first signal is remembered; a second one ends at once."""
    with tempfile.TemporaryDirectory() as folder:
        stop = SharedStop(Path(folder))
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, stop._remember) for number in numbers}
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
