"""Teach a small agent offline. `python scripts/distil.py --help` lists every setting."""

import sys

from tdmpc_prune.command_line import run_command
from tdmpc_prune.training.config import DistilConfig


def main(config: DistilConfig, given: list[str]) -> None:
    """Teach a small agent with random weights all that a dense one computes, with no env step.

    Examples:
      python scripts/distil.py runs/cartpole-swingup/none/seed1 sparsity=0.95
      python scripts/distil.py runs/cartpole-swingup/none/seed1 latent_width=8 hidden_width=16
    """
    from tdmpc_prune.deploy import card
    from tdmpc_prune.saving.agents import save_agent
    from tdmpc_prune.saving.run_folder import command_line
    from tdmpc_prune.training import student

    folder = student.folder_of(config)
    card.check_free(folder)
    taught = student.teach(config, command_line(sys.argv))
    save_agent(folder, taught.agent)
    print(f"{taught.sentence()}\nsaved in {folder}")


if __name__ == "__main__":
    run_command(DistilConfig, main)
