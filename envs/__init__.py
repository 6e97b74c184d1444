"""Control tasks as Gymnasium environments. Knows simulators, and nothing of agents."""

from envs.make import make_env
from envs.tasks import TaskError, suite_tasks

__all__ = ["TaskError", "make_env", "suite_tasks"]
