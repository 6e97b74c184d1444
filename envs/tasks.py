"""What tasks there are: their names, and how often each repeats an action.

A suite task is written with dashes, `<domain>-<task>` (`cartpole-swingup`, `cup-catch`); any
Gymnasium environment is `gym:<id>` (`gym:Pendulum-v1`, `gym:my_module:MyEnv-v0`).
"""

from __future__ import annotations

import difflib
from functools import cache

from envs.rendering import choose_gl_backend

GYM_PREFIX = "gym:"

# TD-MPC's published action repeats for the DeepMind Control Suite (METHOD: Hansen et al. 2022).
_SUITE_REPEATS = {"cartpole": 8, "walker": 2, "finger": 2, "humanoid": 2, "dog": 2}
_SUITE_REPEAT_OTHERWISE = 4
_DOMAIN_ALIASES = {"ball_in_cup": "cup"}


class TaskError(ValueError):
    """A task that does not exist or that an agent of this kind cannot act in."""


@cache
def suite_tasks() -> dict[str, tuple[str, str]]:
    """Every DeepMind Control Suite task: dashed name → (domain, task)."""
    choose_gl_backend()
    from dm_control import suite

    tasks = {}
    for domain, task in suite.ALL_TASKS:
        for name in (domain, _DOMAIN_ALIASES.get(domain, domain)):
            tasks[f"{name}-{task}".replace("_", "-").lower()] = (domain, task)
    return tasks


def find_suite_task(name: str) -> tuple[str, str]:
    """The suite's (domain, task) for a dashed name.

    Raises:
        TaskError: there is no such task; the message names the closest ones.
    """
    tasks = suite_tasks()
    key = name.replace("_", "-").lower()
    if key not in tasks:
        raise TaskError(f"unknown task '{name}'; {_closest(key, tasks)}")
    return tasks[key]


def default_action_repeat(task: str) -> int:
    """Simulator steps per decision: the published one on the suite, 1 for Gymnasium ids."""
    if task.startswith(GYM_PREFIX):
        return 1
    domain, _ = find_suite_task(task)
    return _SUITE_REPEATS.get(domain.lower().removesuffix("_cmu"), _SUITE_REPEAT_OTHERWISE)


def closest_gym_ids(gym_id: str) -> str:
    """A phrase that names the registered Gymnasium ids closest to `gym_id`."""
    import gymnasium

    return _closest(gym_id, gymnasium.registry)


def _closest(name: str, known) -> str:
    matches = difflib.get_close_matches(name, list(known), n=4, cutoff=0.4)
    if not matches:
        return "see envs.suite_tasks() for the suite's, or give gym:<id>"
    return "the closest are " + ", ".join(matches)
