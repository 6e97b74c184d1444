"""Control tasks as Gymnasium environments. Knows simulators, and nothing of agents.

A name is loaded when it is first asked for: who only checks a task's name needs no simulator.
"""

import importlib

_HOMES = {
    "DisplayError": "errors",
    "Film": "rendering",
    "StepError": "errors",
    "TaskError": "errors",
    "Viewer": "viewer",
    "action_limits": "contract",
    "default_action_repeat": "tasks",
    "disturb": "disturbances",
    "draw_nothing": "make",
    "frame_seconds": "contract",
    "make_env": "make",
    "observation_layout": "contract",
    "report": "own",
    "simulator_step_seconds": "contract",
    "suite_tasks": "tasks",
    "task_name": "tasks",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'envs' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"tdmpc_prune.envs.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
