"""Prune a finished agent or autoencoder. `python scripts/prune.py --help` lists every setting."""

import sys

from tdmpc_prune.command_line import run_command
from tdmpc_prune.training.config import PruneCheckpointConfig


def main(config: PruneCheckpointConfig, given: list[str]) -> None:
    """Prune a saved agent or autoencoder: one refitted cut, or several with training after each.

    Examples:
      python scripts/prune.py runs/cartpole-swingup/none/seed1 prune.sparsity=0.95
      python scripts/prune.py runs/cartpole-swingup/none/seed1 explain=plan.json
      python scripts/prune.py runs/cartpole-swingup/none/seed1 prune.steps=4 env_steps=20000
    """
    from tdmpc_prune.training import launch

    if config.explain:
        plan, refit = launch.explain(config, given)
        print(plan.explain())
        if refit:
            print(f"\nwhat a refit would leave:\n\n{refit.table()}")
        print(f"\nwritten to {config.explain}; nothing was cut")
        return
    print(launch.finish(launch.start(launch.pruning_run(config, given), sys.argv)))


if __name__ == "__main__":
    run_command(PruneCheckpointConfig, main)
