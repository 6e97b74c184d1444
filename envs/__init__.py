"""Control tasks as Gymnasium environments. Knows simulators, and nothing of agents."""

from envs.disturbances import disturb
from envs.make import make_env, observation_layout, simulator_step_seconds
from envs.rendering import DisplayError, Film
from envs.tasks import TaskError, default_action_repeat, suite_tasks
from envs.viewer import Viewer

__all__ = [
    "DisplayError",
    "Film",
    "TaskError",
    "Viewer",
    "default_action_repeat",
    "disturb",
    "make_env",
    "observation_layout",
    "simulator_step_seconds",
    "suite_tasks",
]
