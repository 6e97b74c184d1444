"""How a setting is declared, refused and typed: documented dataclass fields, one-line errors."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdmpc_prune.errors import UserError

if TYPE_CHECKING:  # declaring settings needs it not
    from omegaconf import DictConfig

PROGRAM = "tdmpc-prune"

RUN_OR_CHECKPOINT = "a run's folder (its newest checkpoint), or a checkpoint"
DECISIONS = (
    "native (the planner in C, compiled at first use; in training the updates too), torch, or "
    "auto: native where it is the faster one"
)


@dataclass(frozen=True)
class Choice:
    """One of the named values that a group of settings can be given: `model=paper`."""

    value: Any  # an instance of the group's dataclass
    text: str | None  # what it means; None: it is not offered, its command says why


def setting(
    default,
    text: str,
    *,
    choices: Mapping[str, Choice] | None = None,
    unused: Iterable[str] = (),
    positional: bool = False,
    formerly: str | None = None,
    before: Any = None,
):
    """A field with its documentation, which `--help` prints.

    Args:
        default: a class or a function is called for each instance.
        text: what it is, in which unit.
        choices: of a group of settings, by name; the first is the default, up to what `default`
            has of its own.
        unused: of a group of settings: those that have no effect in this command.
        positional: whether an argument without a name means it.
        formerly: the name that it had, which may still be typed.
        before: what a file means that was written before there was this setting; None is the
            default.
    """
    metadata = {
        "help": text,
        "choices": dict(choices or {}),
        "unused": tuple(unused),
        "positional": positional,
        "formerly": formerly,
        "before": before,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(holds: bool, message: str) -> None:
    """Refuse a configuration whose values contradict each other."""
    if not holds:
        raise UserError(message)


def check_machine(device: str, threads: int, decisions: str = "auto") -> None:
    """Refuse a device, thread count or maker of decisions that cannot be."""
    require(
        decisions in ("auto", "native", "torch"),
        f"decisions={decisions} must be auto, native or torch",
    )
    require(device in ("auto", "cpu", "cuda"), f"device={device} must be auto, cpu or cuda")
    require(threads >= 1, f"threads={threads} must be at least 1")


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
    return shlex.join([*command_words(script), *arguments, *values])


def command_words(script: str) -> list[str]:
    """What a command begins with, as it is typed where this one was."""
    installed = (Path(__file__).parent / "scripts").is_dir()  # in a checkout they lie beside it
    if installed or sys.argv[0].startswith(f"{PROGRAM} "):
        return [PROGRAM, script.removesuffix(".py")]
    return ["python", f"scripts/{script}"]


# --- As OmegaConf and JSON have it -----------------------------------------------------------


def thawed(config: Any) -> DictConfig:
    """A configuration for OmegaConf, which makes frozen dataclasses read-only; it may be changed.

    Args:
        config: a dataclass, or an instance of one.
    """
    from omegaconf import OmegaConf

    node = OmegaConf.structured(config)

    def thaw(part: DictConfig) -> None:
        OmegaConf.set_readonly(part, False)
        if not dataclasses.is_dataclass(OmegaConf.get_type(part)):
            OmegaConf.set_struct(part, False)  # a plain dict takes any key
        for key in part:
            if OmegaConf.is_dict(part._get_node(key)):
                thaw(part[key])

    thaw(node)
    return node


@cache
def _schema_node(schema: type) -> DictConfig:
    """Never to be changed."""
    return thawed(schema)


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of JSON types."""
    return dataclasses.asdict(config)


def by_dotted_name(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: `{"model.planner.samples": 256, …}`."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        nested = isinstance(value, dict) and value
        flat |= by_dotted_name(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def from_plain(schema: type, values: dict[str, Any]) -> Any:
    """The configuration that `to_plain` wrote.

    Raises:
        UserError: a setting is unknown here or of the wrong type, and which.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = _with_what_was_meant(schema, values)
        merged = OmegaConf.merge(_schema_node(schema), OmegaConf.create(values))
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{schema.__name__}: {str(error).splitlines()[0]}") from error


def _with_what_was_meant(schema: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values, with those of settings that there were not yet when they were written."""
    values = dict(values)
    for item in dataclasses.fields(schema):
        value, before = values.get(item.name), item.metadata.get("before")
        if item.name not in values and before is not None:
            values[item.name] = before
        elif isinstance(value, dict) and dataclasses.is_dataclass(item.default_factory):
            values[item.name] = _with_what_was_meant(item.default_factory, value)
    return values
