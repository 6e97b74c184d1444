"""Structured pruning of any PyTorch modules whose components are tagged; knows no agent.

Read in this order: `tracing` (which channels are tied), `groups` (the widths that can be cut),
`importance` (which of their units matter), `schedule`, `plan` (which to cut), `surgery` (the cut).
"""
