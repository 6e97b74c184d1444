"""How a setting is declared and refused: documented dataclass fields, and one-line errors."""

from __future__ import annotations

from dataclasses import field

from tdmpc_prune.errors import UserError


def setting(default, text: str):
    """A field with its documentation, which `--help` prints.

    A default that is a class or a function is called for each instance.
    """
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(holds: bool, message: str) -> None:
    """Refuse a configuration whose values contradict each other."""
    if not holds:
        raise UserError(message)
