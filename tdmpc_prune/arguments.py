"""What is typed after a command's name: read, checked against its settings, and put for Hydra.

A text is taken as it is typed, whatever Hydra's own grammar would make of blanks, umlauts or equals
signs in it; 1e5 is an integer where one is wanted; an argument without a name is the checkpoint.
What is wrong is one line that says what to type.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf

from tdmpc_prune.errors import UserError
from tdmpc_prune.settings import Idle, among, quoted

_EXAMPLE = "a setting is given as name=value"


@dataclass(frozen=True)
class Declared:
    """A setting as its dataclass declares it."""

    name: str  # dotted: "prune.sparsity"
    kind: type  # of a value that is not null; for a group of settings its dataclass
    nullable: bool
    default: Any
    text: str
    choices: dict[str, str]  # of a group: name → what it means; the first is the default
    values: dict[str, Any]  # of a group: name → what is chosen, those not offered included
    used: bool  # False: it has no effect in this command
    positional: bool
    formerly: str | None

    @property
    def is_group(self) -> bool:
        return dataclasses.is_dataclass(self.kind)


class Settings:
    """All settings of a command, by dotted name, in the order of their declaration."""

    def __init__(self, schema: type):
        self.schema = schema
        self.declared: dict[str, Declared] = {}
        self._add(schema(), "", ())

    def _add(self, config: Any, prefix: str, unused: tuple[str, ...]) -> None:
        hints, own = typing.get_type_hints(type(config)), vars(type(config))["__annotations__"]
        # What several commands share comes after what a command has of its own.
        for field in sorted(dataclasses.fields(config), key=lambda field: field.name not in own):
            value, name = getattr(config, field.name), prefix + field.name
            alternatives = typing.get_args(hints[field.name])
            nullable = isinstance(hints[field.name], types.UnionType) and type(None) in alternatives
            more = {"choices": {}, "unused": (), "positional": False, "formerly": None}
            more |= {key: field.metadata[key] for key in more if key in field.metadata}
            kind = alternatives[0] if nullable else hints[field.name]
            choices = more["choices"]
            self.declared[name] = Declared(
                name,
                typing.get_origin(kind) or kind,
                nullable,
                value,
                field.metadata["help"],
                {name: c.text for name, c in choices.items() if c.text is not None},
                {name: choice.value for name, choice in choices.items()},
                among([name], *unused, *(f"{n}." for n in unused)) is None,
                more["positional"],
                more["formerly"],
            )
            if dataclasses.is_dataclass(value):
                below = tuple(f"{name}.{part}" for part in more["unused"])
                self._add(value, f"{name}.", (*unused, *below))

    def choices(self, name: str) -> list[str]:
        """The names that a group of settings can be given; none if it has none."""
        return list(self.declared[name].choices) if name in self.declared else []

    def find(self, name: str) -> Declared | None:
        """The setting that is meant by a name, or that holds it as a key; None if there is none."""
        for declared in self.declared.values():
            if name in (declared.name, declared.formerly):
                return declared
            if declared.kind is dict and name.startswith(f"{declared.name}."):
                return replace(declared, name=name, kind=object)
        return None

    @property
    def positional(self) -> Declared | None:
        """What an argument without a name means."""
        return next((d for d in self.declared.values() if d.positional), None)

    def unknown(self, name: str, value: str = "…", chosen: Sequence[str] = ()) -> str:
        """That there is no such setting, and which may be meant.

        Args:
            name: as it was typed.
            value: that it was to have.
            chosen: the groups of settings that a choice was made for.
        """
        known = [d.name for d in self.declared.values() if d.used and not d.is_group]
        by_last_part = {name.rpartition(".")[2]: name for name in reversed(known)}
        last = name.rpartition(".")[2]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        close += [by_last_part[m] for m in difflib.get_close_matches(last, by_last_part, n=3)]
        close = list(dict.fromkeys(close))
        if last in by_last_part and by_last_part[last] in close:
            close = [by_last_part[last]]  # only its group was left out
        hints = []
        for meant in close:
            needed = ""
            if meant.partition(".")[0] not in chosen and hasattr(self.schema, "idle"):
                idle = self.schema().idle([meant])
                needed = f"{idle.needed} " if idle and idle.needed else ""
            hints.append(f"{needed}{meant}={value}" if needed or len(close) == 1 else meant)
        hint = f"; did you mean {', '.join(hints)}?" if hints else ""
        return f"unknown setting '{name}'{hint} (--help lists all)"


@dataclass(frozen=True)
class Arguments:
    """A command line that was understood."""

    known: Settings
    overrides: list[str]  # in Hydra's grammar
    given: list[str]  # names of the settings among them
    swept: list[str]  # those of them that are given several values, one for each job
    multirun: bool
    shown: str | None  # what of Hydra's configuration is to be shown, in place of a run

    @staticmethod
    def of(typed: Sequence[str], known: Settings) -> Arguments:
        """Read what was typed after the command's name.

        Raises:
            UserError: it makes no sense, and what to type.
        """
        words, shown, multirun = list(typed), None, False
        settings: list[tuple[str, str]] = []
        loose: list[str] = []
        while words:
            word = words.pop(0)
            if not word.strip():
                raise UserError(f"an argument is empty; {_EXAMPLE}")
            if word in ("-m", "--multirun"):
                multirun = True
            elif word in ("-c", "--cfg"):
                shown = words.pop(0) if words else ""
                if shown not in ("job", "hydra", "all"):
                    raise UserError(f"{word} {shown}: write --cfg job, which shows the settings")
            elif word.startswith("-") and "/" not in word.partition("=")[0]:
                raise UserError(_no_option(word, known))
            elif _is_loose(word, known):
                loose.append(word)
            else:
                name, _, value = word.partition("=")
                settings.append((name, value))
        settings += _checkpoints(loose, known, settings)
        chosen = [name for name, _ in settings]
        for name in chosen:
            if known.choices(name) and chosen.count(name) > 1:
                raise UserError(f"{name}=… is given twice; leave one out")
        read = [_read(name, value, known, multirun, chosen) for name, value in settings]
        own = [(name, override) for name, override in read if name is not None]
        parser = OverridesParser.create()
        swept = [n for n, o in own if parser.parse_override(o).is_sweep_override()]
        return Arguments(
            known, [override for _, override in read], [n for n, _ in own], swept, multirun, shown
        )

    def swept_over(self, override: str) -> Arguments:
        """The same, with one more setting that has several values."""
        name = override.partition("=")[0]
        overrides, given = [*self.overrides, override], [*self.given, name]
        return replace(self, overrides=overrides, given=given, swept=[*self.swept, name])

    def settings(self, composed: Any) -> Any:
        """An instance of the command's dataclass.

        Args:
            composed: what Hydra made of the overrides.

        Raises:
            UserError: a setting is missing, wrong, or without effect.
        """
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(f"{missing[0]}=… is needed; --help says what it is")
        config = OmegaConf.to_object(composed)
        # What has no effect in one job of a sweep may have one in another.
        swept = {name.partition(".")[0] for name in self.swept}
        given = [name for name in self.given if name.partition(".")[0] not in swept]
        for name in given:
            if not self.known.find(name).used:
                raise UserError(f"{name} has no effect in this command; leave it out")
        if hasattr(config, "idle") and (idle := config.idle(given)):
            raise UserError(refusal_of_idle(idle, composed))
        return config


def refusal_of_idle(idle: Idle, composed: Any) -> str:
    """That a setting has no effect, and what to do."""
    value = OmegaConf.select(composed, idle.name)
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    grouped = isinstance(plain, dict) and "." not in idle.name
    shown = idle.name if grouped else f"{idle.name}={shown_value(plain)}"
    what_to_do = f"add {idle.needed}" if idle.needed else "leave it out"
    return f"{shown} has no effect {idle.reason}; {what_to_do}"


def shown_value(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return "null"
    if value == MISSING:
        return "…"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(shown_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown_value(item)}' for key, item in value.items())}}}"
    return str(value)


def _no_option(word: str, known: Settings) -> str:
    name, _, value = word.lstrip("-").partition("=")
    if declared := known.find(name):
        return f"{word}: settings have no dashes; write {name}={value or _example(declared)}"
    return f"{word} is no option; {_EXAMPLE}, and --help lists all"


def _example(declared: Declared) -> str:
    choices = list(declared.choices)
    if choices:
        return choices[-1] if choices[0] != "none" else choices[1]
    return shown_value(declared.default)


def _is_loose(word: str, known: Settings) -> bool:
    """Whether an argument is a path and no setting, though there may be an equals sign in it."""
    name, equals, _ = word.partition("=")
    if not equals:
        return not word.startswith(("+", "~"))
    if known.positional is None or name.startswith(("hydra/", "+", "~")) or known.find(name):
        return False
    return "/" in name or Path(word).exists()


def _checkpoints(
    loose: list[str], known: Settings, settings: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The setting that arguments without a name stand for.

    Raises:
        UserError: they stand for none.
    """
    if not loose:
        return []
    word, positional = loose[0], known.positional
    if (declared := known.find(word)) and not Path(word).exists():
        raise UserError(f"{word} has no value: {_EXAMPLE}, {word}={_example(declared)}")
    if positional is None:
        raise UserError(f"'{word}' has no name: {_EXAMPLE}; {_meant(word, known)}")
    name = positional.name
    if any(known.find(other) is positional for other, _ in settings):
        raise UserError(f"'{word}' is one checkpoint too many: {name}=… is given, too")
    if len(loose) > 1 and positional.kind is str:
        raise UserError(f"'{loose[1]}' is one checkpoint too many; this command takes one")
    if positional.kind is list or len(loose) > 1:
        return [(name, f"[{','.join(quoted(word) for word in loose)}]")]
    return [(name, quoted(word))]


def _meant(word: str, known: Settings) -> str:
    """What to type instead of a word without a name."""
    if (Path(word) / "run.json").is_file() and known.find("resume"):
        return f"write resume={word} to go on with that run"
    for declared in known.declared.values():
        if word in declared.choices:
            return f"write {declared.name}={word}"
    first = next(iter(known.declared.values()))
    value = _example(first) if first.is_group else word
    return f"write {first.name}={value}, if that is meant"


def _read(
    name: str, value: str, known: Settings, multirun: bool, chosen: Sequence[str]
) -> tuple[str | None, str]:
    """A setting's name (None if it is Hydra's own) and its override in Hydra's grammar.

    Raises:
        UserError: there is no such setting, or it cannot have that value.
    """
    bare = name.lstrip("+~")
    if bare.startswith(("hydra.", "hydra/")):
        override = f"{name}={value}"
        if _parsed(override) is None:
            raise UserError(f"{override} cannot be read: brackets and quotes come in pairs")
        return None, override
    if bare != name:
        what = f"{bare}={value or '<value>'}"
        raise UserError(f"{name}{value and '='}{value}: write {what}, without '{name[0]}'")
    declared = known.find(name)
    if declared is None:
        raise UserError(known.unknown(name, value, chosen))
    name = declared.name
    if declared.is_group and not declared.choices:
        below = [d for d in known.declared.values() if d.name.startswith(f"{name}.")]
        names = ", ".join(d.name for d in below if d.used and not d.is_group)
        raise UserError(f"{name}={value}: {name} is a group of settings; give one of {names}")
    if not value:
        hint = (
            f"the choices are {', '.join(declared.choices)}"
            if declared.choices
            else ("null is none" if declared.nullable else f"the default is {_example(declared)}")
        )
        raise UserError(f"{name}= has no value; {hint}")
    parsed = _parsed(f"{name}={value}")
    if parsed is None:
        if declared.kind in (list, dict):
            raise UserError(_bracketed(declared, value))
        return name, f"{name}={quoted(value)}"
    if parsed.is_sweep_override():
        return name, _sweep(declared, value, parsed, multirun)
    return name, f"{name}={_one_value(declared, value, parsed.value())}"


def _parsed(override: str) -> Override | None:
    """An override as Hydra reads it; None if it cannot."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _one_value(declared: Declared, text: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    if declared.choices and not isinstance(value, str):
        choices = ", ".join(declared.choices)
        raise UserError(f"{declared.name}={text} is not a choice; the choices are {choices}")
    if declared.kind is str and not isinstance(value, str) and value is not None:
        return quoted(text)
    if declared.kind is int and isinstance(value, float) and value.is_integer():
        return str(int(value))
    wrong_list = declared.kind is list and not isinstance(value, list)
    wrong_dict = declared.kind is dict and not isinstance(value, dict)
    if (wrong_list or wrong_dict) and not (isinstance(value, str) and "${" in value):
        raise UserError(_bracketed(declared, text))
    return text


def _bracketed(declared: Declared, text: str) -> str:
    """How a list or a mapping is typed."""
    inner = text.strip("[]{} ")
    if declared.kind is list:
        return f"{declared.name}={text} is no list; write '{declared.name}=[{inner}]'"
    value = inner.rpartition(":")[2].strip()
    return (
        f"{declared.name}={text} is no mapping of names to values; write "
        f"'{declared.name}={{<name>: {value}}}'"
    )


def _sweep(declared: Declared, text: str, parsed: Override, multirun: bool) -> str:
    """Several values, in Hydra's grammar. Raises UserError: this is no sweep, or of wrong ones."""
    name, value = declared.name, parsed.value()
    items = value.list if isinstance(value, ChoiceSweep) else []
    if declared.kind is list and not any(isinstance(item, list) for item in items):
        raise UserError(_bracketed(declared, text))
    if not multirun:
        alone = f", or, if it is one value, quote it: '{name}=\"{text}\"'"
        raise UserError(
            f"{name}={text} is several values: add -m to run one after another"
            f"{alone if declared.kind is str else ''}"
        )
    if declared.kind is int and any(isinstance(item, float) for item in items):
        whole = [isinstance(i, int) or (isinstance(i, float) and i.is_integer()) for i in items]
        if all(whole) and value.simple_form:
            return f"{name}={','.join(str(int(item)) for item in items)}"
    return f"{name}={text}"
