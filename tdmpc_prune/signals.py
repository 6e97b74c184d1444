"""Stopping a long job in an orderly way when SIGINT or SIGTERM arrives."""

from __future__ import annotations

import signal
import sys

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
