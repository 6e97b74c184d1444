"""Structured pruning of any PyTorch modules whose components are tagged; knows no agent.

What networks offer is in `tdmpc_prune.prunable`. In reading order:

What can be cut
    `ties`          which channels stay or go together: the books of a trace
    `rules`         what each PyTorch operation ties
    `tracing`       the watcher that runs a computation without data, and asks the rules
    `structure`     groups of units, and what each costs
    `numbers`       whether a width enters the arithmetic, and so cannot be cut
    `groups`        all of this together: `find_groups`
What should be cut
    `importance`    how much each unit matters, from the gradients of training
    `plan`          the units to cut, as a value
    `allocation`    a plan from importance: `make_plan`
    `soft_masks`    networks whose units are masked softly
    `coefficients`  a plan from a search over how much goes from each group
Cutting
    `sizes`         what modules say of their weights' sizes
    `surgery`       a plan carried out and proved, or undone: `commit`
    `config`        the settings, and the `schedule` of cuts
    `proposals`     from ranked units to a plan of any sparsity
    `stage`         where a run stands in its pruning
    `pruner`        the pruning side of a run: what is due, each cut, and what became of it

The names below are loaded when first asked for. They need neither Hydra nor a simulator.
"""

from tdmpc_prune.lazy import lazily

_HOMES = {
    # What a network offers.
    "tag": "prunable",
    "Computation": "prunable",
    "Calibration": "prunable",
    # What can be cut, what should be, and the cut.
    "find_groups": "pruning.groups",
    "UnknownOperation": "pruning.rules",
    "PruneConfig": "pruning.config",
    "Tracker": "pruning.importance",
    "make_plan": "pruning.allocation",
    "Plan": "pruning.plan",
    "commit": "pruning.surgery",
    "SurgeryError": "pruning.surgery",
    # With data: units ranked by it, and layers fitted to it after the cut.
    "rank_by_data": "pruning.gains",
    "calibration_of": "pruning.refit",
    "commit_refitted": "pruning.refit",
}

__all__ = list(_HOMES)

__getattr__, __dir__ = lazily(__name__, _HOMES)
