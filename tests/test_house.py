"""The plan of the house: who may import whom, and that the package does not print."""

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter

import pytest

import tdmpc_prune
from tests.commands import ROOT

# From the roof down. A room imports from lower floors and from itself; not from its neighbours.
FLOORS = [
    ["scripts"],
    ["analysis", "deploy", "command_line"],
    ["training"],
    ["saving", "evaluation"],
    ["agent", "autoencoder", "pruning"],
    ["native"],
    ["ground"],
    ["envs"],
]
MODULES_OF = {  # rooms that are no folder of the package
    "command_line": ["command_line", "arguments", "help_text", "program", "calls"],
    "ground": [
        "errors",
        "lazy",
        "machine",
        "prunable",
        "settings",
        "signals",
        "thresholds",
        "words",
    ],
    "evaluation": ["evaluation"],
}
PRINTS = {
    "tdmpc_prune/command_line.py",
    "tdmpc_prune/program.py",
}  # help; everything else is printed by scripts


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "tdmpc_prune" else ("tdmpc_prune", *parts)  # as installed
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for folder in ("envs", "tdmpc_prune", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(name):
    """Modules of ours that a module imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports have the whole name of what they import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
    return {module for module in found if module in FILES} - {name}


IMPORTS = {name: imported(name) for name in FILES}


def room(name):
    _, *below = name.split(".")
    if not below:
        return "ground"
    return next((room for room, own in MODULES_OF.items() if below[0] in own), below[0])


def floor(name):
    return next(level for level, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_module_has_a_room():
    rooms = [room for rooms in FLOORS for room in rooms]
    assert {room(name) for name in FILES} == set(rooms)


def test_imports_run_one_way():
    upward = {
        f"{name} → {other}"
        for name, others in IMPORTS.items()
        for other in others
        if room(name) != room(other) and floor(name) >= floor(other)
    }
    assert not upward, sorted(upward)


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def prints(tree):
    """Whether there is a call that prints to the standard output."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if getattr(call.func, "id", None) == "print"]
    return any("file" not in [keyword.arg for keyword in call.keywords] for call in named)


def test_the_package_does_not_print():
    found = {
        str(path.relative_to(ROOT))
        for name, path in FILES.items()
        if room(name) != "scripts" and prints(TREES[name])
    }
    assert found == PRINTS


def test_the_package_list_is_of_the_packages_that_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent for path in FILES.values()}
    there = sorted(module_name(folder / "__init__.py") for folder in folders)
    assert sorted(project["tool"]["setuptools"]["packages"]) == there
    assert all((f / "__init__.py").is_file() for f in folders if f.name != "scripts")


def test_the_public_names_are_there():
    assert all(getattr(tdmpc_prune, name) is not None for name in tdmpc_prune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_agnet'"):
        tdmpc_prune.load_agnet  # noqa: B018
