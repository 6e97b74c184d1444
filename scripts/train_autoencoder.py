"""Train an autoencoder. `python scripts/train_autoencoder.py --help` lists every setting."""

import sys

from tdmpc_prune.command_line import run_command
from tdmpc_prune.training.config import AutoencoderConfig


def main(config: AutoencoderConfig, given: list[str]) -> None:
    """Train an autoencoder on real images, or go on with a run (resume=<its folder>).

    Examples:
      python scripts/train_autoencoder.py prune=bayesian
      python scripts/train_autoencoder.py data=mnist data.dir=<folder with MNIST's IDX files>
    """
    from tdmpc_prune.training import launch

    run = launch.resume(config, given) if config.resume else launch.start(config, sys.argv)
    print(launch.finish(run))


if __name__ == "__main__":
    run_command(AutoencoderConfig, main)
