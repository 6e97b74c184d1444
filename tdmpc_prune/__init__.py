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
    calls         whole runs from Python: `train`, `prune`
    command_line  from what is typed to a function; settings are declared beside their parts

The tasks themselves are in `tdmpc_prune.envs`, whose folder lies beside this one. The names below
are loaded when first asked for.
"""

import importlib.util
import sys
from pathlib import Path

from tdmpc_prune.lazy import lazily

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
    # Whole runs, as the commands do them.
    "train": "calls",
    "prune": "calls",
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


__getattr__, __dir__ = lazily(__name__, _HOMES)


def lying_in(part: str) -> Path:
    """The folder of `envs` or `scripts`: in an installation inside the package, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / part
    return inside if inside.is_dir() else package.parent / part


def _bring_envs() -> None:
    """Let the `envs` beside this package in a checkout be `tdmpc_prune.envs`."""
    name = f"{__name__}.envs"
    spec = importlib.util.spec_from_file_location(name, lying_in("envs") / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = globals()["envs"] = module
    spec.loader.exec_module(module)


_bring_envs()
