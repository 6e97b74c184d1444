"""The errors that a person is meant to read, and foreign ones on one line."""

from __future__ import annotations


class TaskError(ValueError):
    """A task that does not exist or that an agent of this kind cannot act in."""


class StepError(TaskError):
    """A reset or step that failed, or gave what no agent can use: the episode cannot go on."""


class DisplayError(RuntimeError):
    """Nothing can be shown or drawn here, and why."""


def told(error: Exception) -> str:
    """A foreign exception on one line: its type, and the first line of its text if it has one."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
