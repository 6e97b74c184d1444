"""The certificate of stability and what is said and drawn of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tdmpc_prune.analysis.config import StabilityConfig
from tdmpc_prune.analysis.stability import CALIBRATION_SEED, Rate, Stability, weaker_than
from tdmpc_prune.machine import versions
from tdmpc_prune.saving.files import png
from tdmpc_prune.settings import to_plain
from tdmpc_prune.thresholds import least
from tdmpc_prune.words import counted, table

ASSUMPTIONS = (
    "Initial states are independent draws from the task's own distribution; the bounds hold for "
    "states drawn like these, in this simulator, with these disturbances and this planner budget.",
    "W is a learnt function of the dense reference, not a verified Lyapunov function. V_max is "
    "the largest value, and the target set's level a quantile, along the reference's own "
    "undisturbed episodes, which are not those that are judged.",
    "Transitions of one episode depend on each other: the interval of the violation rate uses one "
    "transition outside the target set, drawn at random, of each episode.",
    "An episode stays if W is within the level during the last `hold` of the reference's longest "
    "episode, up to its time limit; one that terminates before did not stay.",
    "Intervals are exact (Clopper-Pearson), 95 %, two-sided, each on its own: no correction is "
    "made for judging several agents.",
    "This is a statistical certificate on sampled states, and no proof.",
)


def demand(config: StabilityConfig) -> str:
    """What an agent has to do to be called safe, in a sentence."""
    return (
        f"safe is an agent that stays in at least "
        f"{Rate.needed(config.probability, config.episodes)} of {config.episodes} episodes (lower "
        f"95 % end {config.probability:g}), with a return drop of at most "
        f"{config.max_return_drop:g}"
    )


def certificate(found: Stability, config: StabilityConfig) -> dict[str, Any]:
    """All that is claimed, and what it rests on; JSON types."""
    return {
        "format": "tdmpc_prune stability certificate",
        "assumptions": ASSUMPTIONS,
        "reference": found.reference,
        "target": asdict(found.target),
        "episodes": {"calibration": config.episodes, "each agent": config.episodes},
        "seeds": {"calibration": config.seed + CALIBRATION_SEED, "each agent": config.seed},
        "settings": to_plain(config),
        "agents": [asdict(one) for one in found.judged],
        "boundary": asdict(found.boundary) if found.boundary else None,
        "return_more_than_the_reference": [one.name for one in weaker_than(found)],
        "versions": versions(),
    }


def text(found: Stability, config: StabilityConfig) -> str:
    """The table and the verdict, as Markdown."""
    rows = [
        (
            one.name,
            f"{one.sparsity:.3f}",
            f"{one.parameters:,}",
            f"{one.violations / one.outside:.3f}" if one.outside else "-",
            str(one.sampled),
            str(one.stayed),
            f"{one.mean_return:.1f}",
            f"{one.return_drop:.1%}",
            "yes" if one.safe else "no",
        )
        for one in found.judged
    ]
    names = ["agent", "sparsity", "parameters", "W does not decrease", "one per episode [95 %]"]
    names += ["reaches and stays [95 %]", "return", "drop", "safe"]
    disturbed = {name: value for name, value in to_plain(config.disturb).items() if value}
    conditions = f"disturbed by {disturbed}" if disturbed else "undisturbed"
    return (
        f"{counted(config.episodes, 'episode')} of each agent, {conditions}; target set: W <= "
        f"{found.target.level:.3g} (V_max {found.target.largest_value:.4g}), to be kept for the "
        f"last {found.target.hold} of {found.target.decisions} decisions\n\n"
        f"{table(rows, names)}\n\n{verdict(found, config)}{_doubt(found)}{_weakness(found)}"
    )


def _weakness(found: Stability) -> str:
    better = weaker_than(found)
    if not better:
        return ""
    best = max(better, key=lambda one: one.mean_return)
    return (
        f"\n\nthe dense reference returns {found.judged[0].mean_return:.1f}, less than "
        f"{', '.join(one.name for one in better)} (up to {best.mean_return:.1f}): it had not "
        f"learnt out, and drops are measured by its lower return. Give a dense agent that has "
        f"learnt as long: reference=…"
    )


def _doubt(found: Stability) -> str:
    """Where the reference may have learnt too little to judge by."""
    dense = found.judged[0]
    better = [
        one.name
        for one in found.judged[1:]
        if one.mean_return >= dense.mean_return and one.stayed.high < dense.stayed.low
    ]
    if not better:
        return ""
    return (
        f"\n\n{', '.join(better)}: the return is not less than the dense agent's, but its W does "
        f"not fall there; it may have learnt too little to know these states. Give a dense agent "
        f"that has learnt as long: reference=…"
    )


def verdict(found: Stability, config: StabilityConfig) -> str:
    """The boundary in a sentence."""
    wanted = (
        f"reaching and staying with probability {config.probability:g} (lower 95 % bound) and a "
        f"return drop of at most {config.max_return_drop:g}"
    )
    if len(found.judged) == 1:
        return "only the dense agent was judged: there is nothing that was pruned"
    if found.boundary is None or found.boundary.sparsity == 0:
        return f"safe-compression boundary: none of the cuts is safe ({wanted})"
    at = found.boundary.sparsity
    below = [one.name for one in found.judged if not one.safe and one.sparsity < at]
    return (
        f"safe-compression boundary: sparsity {at:.3f} ('{found.boundary.name}'), for {wanted}; a "
        f"statistical certificate, no proof"
        + (f". Not shown to be safe below it: {', '.join(below)}" if below else "")
    )


def trajectories(found: Stability) -> str:
    """W of every episode, a line each, as CSV: agent, episode, then W at each decision."""
    lines = [
        ",".join([f'"{name}"', str(i), *(f"{value:.4g}" for value in gap)])
        for name, gaps in found.gaps.items()
        for i, gap in enumerate(gaps)
    ]
    return "\n".join(["agent,episode,W from the initial state on", *lines]) + "\n"


def trajectories_picture(found: Stability) -> bytes:
    """W along the episodes of the dense agent, the one at the boundary, and the sparsest; PNG."""
    chosen = {found.judged[0].name: found.judged[0]}
    for one in (found.boundary, found.judged[-1]):
        if one:
            chosen[one.name] = one
    figure = Figure(figsize=(1 + 4 * len(chosen), 4), layout="constrained")
    axes = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axis, one in zip(axes, chosen.values(), strict=True):
        gaps = found.gaps[one.name]
        for gap in gaps:
            axis.plot(gap, color="C0", alpha=min(0.5, 10 / len(gaps)), linewidth=0.8)
        shortest = min(len(gap) for gap in gaps)
        median = np.median([gap[:shortest] for gap in gaps], axis=0)
        axis.plot(median, color="C3", linewidth=2, label="median")
        axis.axhline(found.target.level, color="black", linestyle="--", label="target set")
        axis.set_title(f"{one.name}, sparsity {one.sparsity:.3f}", fontsize=10)
        axis.set_xlabel("decisions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("value gap W of the dense reference")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, fontsize=8)
    return png(figure)


def boundary_picture(found: Stability, config: StabilityConfig) -> bytes:
    """Share of episodes that stay, and return, against sparsity, with the boundary; PNG."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    x = [one.sparsity for one in found.judged]
    share = np.array([one.stayed.successes / one.stayed.trials for one in found.judged])
    low = share - [one.stayed.low for one in found.judged]
    high = [one.stayed.high for one in found.judged] - share
    top.errorbar(x, share, [low, high], fmt="o-", capsize=3, label="share, exact 95 % interval")
    top.axhline(config.probability, color="C3", linestyle="--", label="required of its lower end")
    top.set_ylabel("reaches the target set and stays")
    top.set_ylim(-0.03, 1.03)
    bottom.plot(x, [one.mean_return for one in found.judged], "o-")
    dense = found.judged[0].mean_return
    lowest = least(dense, config.max_return_drop)
    bottom.axhline(lowest, color="C3", linestyle="--", label="least return")
    bottom.set_ylabel("return")
    bottom.set_xlabel("sparsity")
    bottom.set_ylim(bottom=min(0, bottom.get_ylim()[0]))
    for axis in (top, bottom):
        _mark_boundary(axis, found)
        axis.grid(alpha=0.3)
    handles = {
        label: line
        for axis in (top, bottom)
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8)
    return png(figure)


def _mark_boundary(axis: Axes, found: Stability) -> None:
    if found.boundary:
        at = found.boundary.sparsity
        axis.axvline(at, color="C2", linewidth=2, zorder=0, label="boundary")
