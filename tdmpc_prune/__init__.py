"""TD-MPC on control tasks, built to be compressed: learn, prune meanwhile, fit, export.

Read the parts in this order:

    prunable      what networks offer to be pruned: tags, and what is computed with them
    agent         TD-MPC itself: world model, planner, replay, learner; and its controller
    pruning       which units are tied, which matter, when and which to cut, and the cut
    autoencoder   a second kind of network, pruned by the same code
    evaluation    what an agent comes to in whole episodes
    saving        agents, checkpoints and runs on disk
    training      the run: learning, pruning steps, measurements, stop and resume
    deploy        playing, fitting to a control rate, export, benchmark
    analysis      comparisons, sensitivity, stability, studies
    command_line  from what is typed to a function; settings are declared beside their parts

The tasks themselves are in the package `envs`. The names below are loaded when first asked for.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"

_HOMES = {
    # A saved agent, acting and judged.
    "load": "saving.agents",
    "load_agent": "saving.agents",
    "save_agent": "saving.agents",
    "Agent": "agent.agent",
    "Interface": "agent.agent",
    "Controller": "agent.controller",
    "ObservationError": "agent.controller",
    "evaluate": "evaluation",
    # Your own network: tag it, trace it, rank its units while it learns, plan, cut.
    "tag": "prunable",
    "Computation": "prunable",
    "find_groups": "pruning.groups",
    "PruneConfig": "pruning.config",
    "Tracker": "pruning.importance",
    "make_plan": "pruning.allocation",
    "commit": "pruning.surgery",
    # What a person is meant to read.
    "UserError": "errors",
    "RunError": "errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'tdmpc_prune' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"tdmpc_prune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _check_envs(root: Path) -> None:
    """Say so in one line if another `envs` comes before this package's own.

    Raises:
        ImportError: it does; of a command it is the exit, with code 2.
    """
    try:
        found = importlib.util.find_spec("envs")
    except ValueError:  # something without a place is imported under that name
        found = None
    ours = root / "envs" / "__init__.py"
    if found and found.origin and Path(found.origin).resolve() == ours.resolve():
        return
    places = list(found.submodule_search_locations or [found.origin]) if found else []
    what = (
        f"'{places[0]}' hides this package's own 'envs': rename it, or take its folder out of "
        f"PYTHONPATH (sys.path)"
        if places
        else f"this package's own 'envs' is not found (it lies in '{ours.parent}')"
    )
    if sys.argv and Path(sys.argv[0]).resolve().parent == root / "scripts":
        print(f"error: {what}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(what)


_check_envs(Path(__file__).resolve().parents[1])
