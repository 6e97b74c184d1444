"""How a setting is declared, refused and typed: documented dataclass fields, one-line errors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tdmpc_prune.errors import UserError


def setting(
    default,
    text: str,
    *,
    choices: Mapping[str, str] | None = None,
    unused: Iterable[str] = (),
    positional: bool = False,
    formerly: str | None = None,
):
    """A field with its documentation, which `--help` prints.

    Args:
        default: a class or a function is called for each instance.
        text: what it is, in which unit.
        choices: of a group of settings: name → what it means; the first is the default.
        unused: of a group of settings: those that have no effect in this command.
        positional: whether an argument without a name means it.
        formerly: the name that it had, which may still be typed.
    """
    metadata = {
        "help": text,
        "choices": dict(choices or {}),
        "unused": tuple(unused),
        "positional": positional,
        "formerly": formerly,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(holds: bool, message: str) -> None:
    """Refuse a configuration whose values contradict each other."""
    if not holds:
        raise UserError(message)


@dataclass(frozen=True)
class Idle:
    """A setting that was given and has no effect; what a configuration's `idle(given)` finds."""

    name: str
    reason: str  # "without …", "with …"
    needed: str = ""  # what has to be typed beside it, if that helps


def among(given: Iterable[str], *names: str) -> str | None:
    """The first given setting that is one of `names`, or lies below one that ends in a dot."""
    for one in given:
        if any(one == name or (name.endswith(".") and one.startswith(name)) for name in names):
            return one
    return None


# --- As it is typed --------------------------------------------------------------------------

_PLAIN = re.compile(r"[A-Za-z_./-][\w./:-]*", re.ASCII)


def quoted(value: str) -> str:
    """A text as Hydra reads it back, whatever is in it."""
    if _PLAIN.fullmatch(value) and not _has_another_meaning(value):
        return value
    value = value.replace("${", r"\${")
    # Backslashes count for themselves but before a quotation mark, and at the end.
    escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + (r"\"" if m[2] else ""), value)
    return f'"{escaped}"'


def _has_another_meaning(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value.lower() in ("null", "true", "false")
    return True


def typed(script: str, *arguments: str, **settings: Any) -> str:
    """A command that can be pasted, for example `typed("train.py", resume=run_dir)`."""
    values = [
        f"{name}={value if isinstance(value, int) else quoted(str(value))}"
        for name, value in settings.items()
    ]
    return shlex.join(["python", f"scripts/{script}", *arguments, *values])
