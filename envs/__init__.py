"""Control tasks as Gymnasium environments. Knows simulators, and nothing of agents."""

from envs.contract import frame_seconds, observation_layout, simulator_step_seconds
from envs.disturbances import disturb
from envs.errors import DisplayError, StepError, TaskError
from envs.make import make_env
from envs.rendering import Film
from envs.tasks import default_action_repeat, suite_tasks, task_name
from envs.viewer import Viewer

__all__ = [
    "DisplayError",
    "Film",
    "StepError",
    "TaskError",
    "Viewer",
    "default_action_repeat",
    "disturb",
    "frame_seconds",
    "make_env",
    "observation_layout",
    "simulator_step_seconds",
    "suite_tasks",
    "task_name",
]
