"""What a training run does when its pruning is due: one function for each small step.

`Compression` decides what is due and does it to the networks; here is what surrounds it in a run:
evaluations, history, TensorBoard, plans on file, checkpoints.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tdmpc_prune import pruning_report
from tdmpc_prune.checkpoint import save_agent
from tdmpc_prune.errors import RunError
from tdmpc_prune.evaluation import median_decision_milliseconds
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.surgery import SurgeryError
from tdmpc_prune.run_log import RunLog

if TYPE_CHECKING:
    from tdmpc_prune.training import Trainer


def gather(trainer: Trainer) -> None:
    """Show the tracker the gradients of a batch; nothing is learned from it."""
    batch, _ = trainer.replay.sample(
        trainer.config.model.learning.batch, trainer.rng, trainer.device
    )
    trainer.learner.update(batch, trainer.generator, learn=False)
    trainer.compression.gathered()
    trainer.log.progress(doing=f"gathering gradients ({trainer.compression.stage.gathered})")


def plan_one_cut(trainer: Trainer) -> Plan:
    """The plan of one cut to the final sparsity, without changing anything saved.

    Plays and gathers what the importance needs.
    """
    env_steps = trainer.progress.env_steps
    with tempfile.TemporaryDirectory() as folder:
        trainer.log = RunLog(Path(folder), env_steps, trainer.config.env_steps, 0)
        while trainer.compression.due(env_steps) == "gather":
            trainer.step()
        trainer.log.close()
    return trainer.compression.plan_at(1.0, trainer.config.prune.sparsity)


def parent_dir(run_dir: Path) -> Path:
    """Where a run keeps the dense agent that its own comes from."""
    return run_dir / "agents" / "dense"


def measure(trainer: Trainer) -> None:
    """The control return before a cut, right after it, and while it recovers."""
    config = trainer.config
    evaluation = trainer.evaluation(min(config.prune.eval_episodes, config.eval_episodes))
    if evaluation is None:
        return
    if trainer.agent().is_dense:
        _keep(trainer, parent_dir(trainer.run_dir))
    compression, env_steps = trainer.compression, trainer.progress.env_steps
    speed = median_decision_milliseconds(trainer.model, trainer.config.model)
    measured = {"mean": evaluation.mean, "std": evaluation.std, "decision_ms": speed}
    moment, record = compression.measured(env_steps, measured)
    size = compression.size()
    trainer.log.record(
        "tracking",
        env_steps,
        moment=moment,
        step=record["step"],
        **measured,
        returns=evaluation.returns,
        **size,
    )
    trainer.log.scalars(env_steps, {"pruning/return": evaluation.mean})
    trainer.log.agent(env_steps, size, speed)
    trainer.log.progress(evaluation=f"{evaluation.mean:.0f}")
    if moment in ("recovered", "not recovered"):
        trainer.log.record("pruning step", env_steps, **record)
        trainer.log.say(pruning_report.sentence(record, compression.schedule.steps))
    trainer.progress.history = trainer.log.history
    if moment == "recovered":
        _keep(trainer, trainer.run_dir / "agents" / f"step-{record['step']}")
        trainer.save()


def _keep(trainer: Trainer, folder: Path) -> None:
    """Save the agent as it is, unless the run did so before it was cut off."""
    if not folder.exists():
        save_agent(folder, trainer.agent())


def cut(trainer: Trainer) -> None:
    """Plan a cut, write the plan down, and carry it out."""
    compression, env_steps = trainer.compression, trainer.progress.env_steps
    plan = compression.next_plan(env_steps)
    if not plan.removed:
        compression.skip()
        return
    step = compression.stage.step + 1
    folder = trainer.run_dir / "plans"
    folder.mkdir(exist_ok=True)
    plan.save(folder / f"step-{step}.json")
    (folder / f"step-{step}.md").write_text(plan.explain() + "\n")
    try:
        compression.cut(plan, env_steps)
    except SurgeryError as error:
        raise RunError(f"cut {step} was undone and the run stopped: {error}") from error
    trainer.log.record("cut", env_steps, step=step, target=plan.sparsity, **compression.size())
    trainer.progress.history = trainer.log.history


def undo(trainer: Trainer) -> None:
    """Go back to the networks, optimisers and tracker before a cut that did not recover."""
    model, state = trainer.compression.before_cut()
    trainer.take_learner(model, state, trainer.learner.updates)
    compression, env_steps = trainer.compression, trainer.progress.env_steps
    compression.undo(trainer.learner)
    size = compression.size()
    trainer.log.record("undone", env_steps, step=compression.stage.record["step"], **size)
    trainer.progress.history = trainer.log.history
    trainer.log.agent(env_steps, size, None)
    trainer.save()


def log_importance(trainer: Trainer) -> None:
    """Importance by group, and how alike the metrics rank the units; five times an evaluation."""
    progress, compression = trainer.progress, trainer.compression
    if progress.env_steps < progress.next_importance:
        return
    importance = compression.importance(progress.env_steps)
    if not importance:
        return
    progress.next_importance = progress.env_steps + trainer.config.eval_every // 5
    correlations = compression.rank_correlations(progress.env_steps)
    trainer.log.record("importance", progress.env_steps, **importance, correlations=correlations)
    progress.history = trainer.log.history
    trainer.log.scalars(
        progress.env_steps,
        {
            f"importance by {kind[:-1]}/{metric}/{name}": value
            for kind, metrics in importance.items()
            for metric, values in metrics.items()
            for name, value in values.items()
        }
        | {f"rank correlation/{pair}": value for pair, value in correlations.items()},
    )


def show(trainer: Trainer) -> None:
    """The pictures of a finished pruning run."""
    for path in pruning_report.save(trainer.run_dir):
        trainer.log.picture(f"pruning/{path.stem}", path, trainer.progress.env_steps)
