"""What tasks there are: their names, and how often each repeats an action.

A suite task is written with dashes, `<domain>-<task>` (`cartpole-swingup`, `cup-catch`); any
Gymnasium environment is `gym:<id>` (`gym:Pendulum-v1`, `gym:my_module:MyEnv-v0`); a class or
function in a file that makes one is `file:<path>:<name>` (`file:my_env.py:Arm`).
"""

from __future__ import annotations

import difflib
import os
from functools import cache

from tdmpc_prune.envs.errors import TaskError, told

GYM_PREFIX, FILE_PREFIX = "gym:", "file:"

# TD-MPC's published action repeats for the DeepMind Control Suite (METHOD: Hansen et al. 2022).
_SUITE_REPEATS = {"cartpole": 8, "walker": 2, "finger": 2, "humanoid": 2, "dog": 2}
_SUITE_REPEAT_OTHERWISE = 4
_DOMAIN_ALIASES = {"ball_in_cup": "cup"}


def task_name(task: str) -> str:
    """The one name of a task, under which it is saved and compared.

    `Cartpole_Swingup` is `cartpole-swingup`, and `ball-in-cup-catch` is `cup-catch`; Gymnasium's
    ids, which are not ours, stay as they are. Whether there is such a task is not looked up.
    """
    if task.startswith(GYM_PREFIX):
        return task
    if task.startswith(FILE_PREFIX):
        path, colon, maker = task.removeprefix(FILE_PREFIX).rpartition(":")
        return f"{FILE_PREFIX}{os.path.normpath(path)}{colon}{maker}" if path else task
    name = _dashed(task)
    for domain, alias in _DOMAIN_ALIASES.items():
        if name.startswith(f"{_dashed(domain)}-"):
            return alias + name.removeprefix(_dashed(domain))
    return name


@cache
def suite_tasks() -> dict[str, tuple[str, str]]:
    """Every DeepMind Control Suite task: dashed name → (domain, task)."""
    # Which needs Gymnasium; a name alone does not.
    from tdmpc_prune.envs.rendering import choose_gl_backend

    choose_gl_backend()
    try:
        from dm_control import suite
    except Exception as error:  # the OpenGL backend's errors, too
        raise TaskError(f"the DeepMind Control Suite cannot be loaded: {told(error)}") from error

    tasks = {}
    for domain, task in suite.ALL_TASKS:
        for name in (domain, _DOMAIN_ALIASES.get(domain, domain)):
            tasks[_dashed(f"{name}-{task}")] = (domain, task)
    return tasks


def find_suite_task(name: str) -> tuple[str, str]:
    """The suite's (domain, task) for a dashed name.

    Raises:
        TaskError: there is no such task; the message names the closest ones.
    """
    tasks = suite_tasks()
    key = _dashed(name)
    if key not in tasks:
        known = [*_gym_ids_named(name), *difflib.get_close_matches(key, tasks, n=4, cutoff=0.4)]
        raise TaskError(f"unknown task '{name}'; {_suggested(known)}")
    return tasks[key]


def default_action_repeat(task: str) -> int:
    """Simulator steps per decision: the published one on the suite, 1 for others' tasks."""
    if task.startswith((GYM_PREFIX, FILE_PREFIX)):
        return 1
    domain, _ = find_suite_task(task)
    return _SUITE_REPEATS.get(domain.lower().removesuffix("_cmu"), _SUITE_REPEAT_OTHERWISE)


def closest_gym_tasks(module: str, gym_id: str) -> str:
    """A phrase that names the tasks closest to a Gymnasium id of a module, as they are typed."""
    import gymnasium

    prefix = f"{GYM_PREFIX}{module}:" if module else GYM_PREFIX
    by_lower = {known.lower(): known for known in gymnasium.registry}
    close = difflib.get_close_matches(gym_id.lower(), by_lower, n=4, cutoff=0.4)
    return _suggested([prefix + by_lower[match] for match in close])


def _gym_ids_named(name: str) -> list[str]:
    """The Gymnasium tasks that somebody means who forgets what goes before an id."""
    import gymnasium

    by_lower = {known.lower(): known for known in gymnasium.registry}
    close = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.8)
    return [f"{GYM_PREFIX}{by_lower[match]}" for match in close]


def _dashed(name: str) -> str:
    return name.strip().replace("_", "-").lower()


def _suggested(tasks: list[str]) -> str:
    if not tasks:
        return "see envs.suite_tasks() for the suite's, or give gym:<id> or file:<path>:<class>"
    return "the closest are " + ", ".join(tasks)
