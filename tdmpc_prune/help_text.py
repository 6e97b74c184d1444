"""What `--help` prints: what a command is for, examples, and every setting that it uses."""

from __future__ import annotations

import inspect
import re
import textwrap

from tdmpc_prune.arguments import Declared, Settings, shown_value
from tdmpc_prune.settings import command_words

_WIDTH = 100
_WIDEST_NAME = 51  # what is longer has a line of its own


def help_text(name: str, known: Settings, purpose: str) -> str:
    """The help of a command.

    Args:
        name: of the command.
        known: its settings; in the order of their declaration, those of groups at the end.
        purpose: what it does, and examples: paragraphs.
    """
    positional = known.positional
    folder = f" [<{positional.name}>]" if positional else ""
    lines = [
        *_paragraphs(_as_typed_here(inspect.cleandoc(purpose))),
        "",
        _as_typed_here(f"usage: python scripts/{name}.py{folder} [name=value …]"),
        "",
    ]
    groups = [d for d in known.declared.values() if d.is_group and "." not in d.name]
    top = [d for d in known.declared.values() if "." not in d.name]
    lines += _table([d for d in top if not d.is_group or d.choices])
    for group in groups:
        own = [d for d in known.declared.values() if d.name.startswith(f"{group.name}.")]
        own = [d for d in own if d.used and not d.is_group and not _is_choice(d, group)]
        if own:
            lines += ["", *_wrapped(f"{group.name}: {group.text}", _WIDTH), *_table(own)]
    lines += [
        "",
        "Several values and -m make a sweep: -m seed=1,2,3. --cfg job shows the settings only.",
    ]
    return "\n".join(lines)


def _as_typed_here(text: str) -> str:
    return re.sub(
        r"python scripts/(\w+\.py)", lambda found: " ".join(command_words(found[1])), text
    )


def _paragraphs(text: str) -> list[str]:
    """Wrapped, but lines that are indented."""
    lines: list[str] = []
    for line in text.splitlines():
        lines += [line] if line.startswith(" ") or not line else textwrap.wrap(line, _WIDTH)
    return lines


def _is_choice(declared: Declared, group: Declared) -> bool:
    """Whether a group's setting only repeats which choice was made: prune.method, data.name."""
    return isinstance(declared.default, str) and declared.default in (
        *group.choices,
        getattr(group.default, "method", None),
    )


def _table(settings: list[Declared]) -> list[str]:
    """Settings with their defaults and what they are, and their choices."""
    rows: list[tuple[str, str]] = []
    for declared in settings:
        value = next(iter(declared.choices), None) or shown_value(declared.default)
        rows.append((f"  {declared.name}={value}", declared.text))
        rows += [(f"    {declared.name}={name}", text) for name, text in declared.choices.items()]
    column = min(max(len(left) for left, _ in rows), _WIDEST_NAME) + 2
    lines = []
    for left, text in rows:
        texts = _wrapped(text, _WIDTH - column)
        if len(left) > _WIDEST_NAME:
            lines += textwrap.wrap(left, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)
        else:
            lines.append(f"{left:<{column}}{texts.pop(0)}")
        lines += [" " * column + line for line in texts]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text, the last of which is more than one word."""
    lines = textwrap.wrap(text, width, break_on_hyphens=False)
    if len(lines) > 1 and " " not in lines[-1] and " " in lines[-2]:
        before, _, word = lines[-2].rpartition(" ")
        lines[-2:] = [before, f"{word} {lines[-1]}"]
    return lines
