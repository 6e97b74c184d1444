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
    `pruner`        the pruning side of a run: what is due, each cut, and what became of it
"""
