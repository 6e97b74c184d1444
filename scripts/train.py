"""Train an agent. `python scripts/train.py --help` lists every setting."""

import sys

from tdmpc_prune import training
from tdmpc_prune.command_line import run_command
from tdmpc_prune.config import TrainConfig


def train(config: TrainConfig, given: list[str]) -> None:
    """Train a TD-MPC agent on a control task, or go on with a run (resume=<its folder>)."""
    fresh = not config.resume
    trainer = training.start(config, sys.argv) if fresh else training.resume(config, given)
    try:
        evaluation = trainer.run()
    except training.Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from stopped
    print(
        f"return {evaluation.mean:.1f} ± {evaluation.std:.1f} over "
        f"{len(evaluation.returns)} episodes after {trainer.progress.env_steps} env steps\n"
        f"everything is in   {trainer.run_dir}\n"
        f"evaluate it with   python scripts/evaluate.py checkpoint={trainer.run_dir}\n"
        f"compare runs with  tensorboard --logdir runs"
    )


if __name__ == "__main__":
    run_command("train", train)
