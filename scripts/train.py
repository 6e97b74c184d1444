"""Train an agent. `python scripts/train.py --help` lists every setting."""

import sys

from tdmpc_prune.command_line import run_command
from tdmpc_prune.training.config import TrainConfig


def main(config: TrainConfig, given: list[str]) -> None:
    """Train a TD-MPC agent on a control task, or go on with a run (resume=<its folder>).

    Examples:
      python scripts/train.py task=cartpole-swingup prune=bayesian
      python scripts/train.py task=gym:Pendulum-v1 seed=2
      python scripts/train.py task=file:my_env.py:Arm
      python scripts/train.py resume=runs/cartpole-swingup/bayesian/seed1 env_steps=100000
      python scripts/train.py -m task=cartpole-swingup seed=1,2,3
    """
    from hydra.core.hydra_config import HydraConfig
    from tdmpc_prune.envs import draw_nothing

    from tdmpc_prune.training import launch

    if not config.resume and not HydraConfig.initialized():  # a sweep may go on with other tasks
        draw_nothing(config.task)
    if about := launch.task_report(config):
        print(about, flush=True)
    run = launch.resume(config, given) if config.resume else launch.start(config, sys.argv)
    print(launch.finish(run))


if __name__ == "__main__":
    run_command(TrainConfig, main)
