"""The way from a command line to a function: Hydra, `--help`, and errors that a person can read.

Exit codes: 0 done, 1 the run could not go on, 2 wrong input, 128 + n stopped by signal n.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from envs import DisplayError, TaskError
from tdmpc_prune import config as configuration
from tdmpc_prune.errors import RunError, UserError


def run_command(name: str, function: Callable[[Any, list[str]], None]) -> None:
    """Run `function(settings, names of the settings given on the command line)`, and exit.

    Args:
        name: the command, a key of `config.COMMANDS`.
        function: gets an instance of the command's dataclass.
    """
    schema = configuration.COMMANDS[name]
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(name, schema, function.__doc__ or ""))
        return
    configuration.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing them

    @hydra.main(version_base="1.3", config_path="pkg://tdmpc_prune.conf", config_name=name)
    def job(settings) -> None:
        try:
            missing = sorted(OmegaConf.missing_keys(settings))
            if missing:
                raise UserError(f"{missing[0]}=… is needed; --help says what it is")
            given = [item.split("=")[0] for item in HydraConfig.get().overrides.task]
            function(OmegaConf.to_object(settings), given)
        except (UserError, TaskError, DisplayError, RunError, OmegaConfBaseException) as error:
            # Exits here, inside the job, because Hydra prints its own line on what passes it.
            _exit(error, schema)

    try:
        job()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (HydraException, OmegaConfBaseException) as error:
        _exit(error, schema)


def run_sweeps(
    name: str,
    function: Callable[[Any, list[str]], None],
    sweeps: Callable[[Any], Iterable[str]],
    conclude: Callable[[Any], None],
) -> None:
    """Run `function` in sweeps through the Hydra launcher that the command line chooses.

    Args:
        name: the command, a key of `config.COMMANDS`.
        function: as for `run_command`; it gets the settings with one sweep's overrides.
        sweeps: from the settings, the override of one sweep after another.
        conclude: called at the end.
    """
    schema, arguments = configuration.COMMANDS[name], sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(help_text(name, schema, function.__doc__ or ""))
        return
    configuration.register()
    try:
        with hydra.initialize_config_module("tdmpc_prune.conf", version_base="1.3"):
            settings = OmegaConf.to_object(hydra.compose(name, arguments))
        for override in sweeps(settings):
            sys.argv = [sys.argv[0], "--multirun", *arguments, override]
            run_command(name, function)
        conclude(settings)
    except (UserError, TaskError, RunError, HydraException, OmegaConfBaseException) as error:
        _exit(error, schema)


def _exit(error: Exception, schema: type) -> None:
    print(f"error: {explain(error, schema)}", file=sys.stderr)
    raise SystemExit(1 if isinstance(error, RunError) else 2)


def explain(error: Exception, schema: type) -> str:
    """One line for a person, from an error of ours, of Hydra's or of OmegaConf's."""
    if isinstance(error, (UserError, TaskError, DisplayError, RunError)):
        return str(error)
    text = str(error)
    cause = str(error.__cause__ or "")
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_setting(match[1], schema)
    if match := re.search(r"Could not find '([^/']+)/([^']+)'", text):
        group, choice = match.groups()
        known = ", ".join(configuration.GROUPS.get(group, {}))
        return f"{group}={choice} is not a choice; the choices are {known}"
    if match := re.search(r"Error merging override (\S+)", text):
        return f"{match[1]}: {cause.splitlines()[0]}"
    return " ".join(text.splitlines()[:2])


def _unknown_setting(name: str, schema: type) -> str:
    known = [field for field, _, _ in _fields(schema)]
    by_last_part = {field.rpartition(".")[2]: field for field in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    last = name.rpartition(".")[2]
    close += [by_last_part[m] for m in difflib.get_close_matches(last, by_last_part, n=3)]
    hint = f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""
    return f"unknown setting '{name}'{hint} (--help lists all)"


def help_text(name: str, schema: type, purpose: str) -> str:
    """What the command does, and every setting with its default and documentation."""
    rows = [(field, _shown(default), text) for field, default, text in _fields(schema)]
    left = max(len(field) + len(default) for field, default, _ in rows) + 1
    lines = [
        purpose.strip(),
        "",
        f"usage: python scripts/{name}.py [setting=value ...]",
        "       -m sweeps over comma-separated values (seed=1,2,3); --cfg job shows the settings",
        "",
    ]
    lines += [f"  {f'{field}={default}':<{left}}  {text}" for field, default, text in rows]
    for group, choices in configuration.GROUPS.items():
        if any(field.name == group for field in dataclasses.fields(schema)):
            lines += ["", f"choices for {group}=: {', '.join(choices)}"]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    return {"None": "null", MISSING: "…"}.get(str(default), str(default))


def _fields(schema: type) -> list[tuple[str, Any, str]]:
    """Every setting as (dotted name, default, documentation)."""

    def walk(config: Any, prefix: str) -> list[tuple[str, Any, str]]:
        found = []
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                found += walk(value, f"{prefix}{field.name}.")
            else:
                found.append((prefix + field.name, value, field.metadata["help"]))
        return found

    return walk(schema(), "")
