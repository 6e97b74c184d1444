"""`tdmpc-prune <command>`: the scripts as one program, which an installation brings along."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
from pathlib import Path

from tdmpc_prune import __version__, lying_in
from tdmpc_prune.command_line import console
from tdmpc_prune.errors import UserError
from tdmpc_prune.settings import PROGRAM

COMMANDS = (  # in the README's order
    *("train", "train_autoencoder", "prune", "distil", "import", "groups", "evaluate", "compare"),
    *("fit", "export", "run_exported", "benchmark", "sensitivity", "importance", "stability"),
    *("optimize_coefficients", "compare_coefficients", "study"),
)


def main() -> None:
    """Run the command that is named first on the command line."""
    name, *arguments = sys.argv[1:] or ["--help"]
    with console():
        if name in ("--help", "-h", "help"):
            print(_help())
            return
        if name == "--version":
            print(__version__)
            return
        command = name.replace("-", "_")
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            mend = f"did you mean {close[0]}?" if close else f"{PROGRAM} --help lists them"
            raise UserError(f"unknown command '{name}'; {mend}")
    sys.argv = [f"{PROGRAM} {command}", *arguments]
    _run_as_main(_script(command))


def _run_as_main(script: Path) -> None:
    """As `runpy.run_path` does, which would put the script's path into `sys.argv`."""
    spec = importlib.util.spec_from_file_location("__main__", script)
    module = importlib.util.module_from_spec(spec)
    module.__spec__ = None  # or a launcher's processes would look for it by name
    sys.modules["__main__"] = module
    spec.loader.exec_module(module)


def _script(command: str) -> Path:
    return lying_in("scripts") / f"{command}.py"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROGRAM} <command> [setting=value …]", ""]
    for command in COMMANDS:
        about = ast.get_docstring(ast.parse(_script(command).read_text())) or ""
        lines.append(f"  {command:<{width}}  {re.split('[.:]', about)[0]}")
    return "\n".join([*lines, "", f"{PROGRAM} <command> --help lists a command's settings."])
