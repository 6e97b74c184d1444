"""The end of a command that runs a training: what is printed, and the exit code of a stop."""

from __future__ import annotations

import sys

from tdmpc_prune.signals import Stopped
from tdmpc_prune.training import Trainer


def finish(trainer: Trainer) -> None:
    """Run to the end and say what came of it; a stop by a signal exits with 128 + its number."""
    try:
        evaluation = trainer.run()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from stopped
    pruned = ""
    if trainer.compression:
        size, dense = trainer.compression.size(), sum(trainer.compression.dense.values())
        pruned = (
            f"{size['parameters']} of {dense} parameters are left (sparsity "
            f"{size['sparsity']:.3f}), and {size['planning_macs']:,} of "
            f"{trainer.compression.dense_macs:,} planning MACs per decision\n"
            f"what each cut did   {trainer.run_dir / 'pruning.png'}\n"
        )
    print(
        f"return {evaluation.mean:.1f} ± {evaluation.std:.1f} over "
        f"{len(evaluation.returns)} episodes after {trainer.progress.env_steps} env steps\n"
        f"{pruned}"
        f"everything is in   {trainer.run_dir}\n"
        f"evaluate it with   python scripts/evaluate.py checkpoint={trainer.run_dir}\n"
        f"compare runs with  tensorboard --logdir runs"
    )
