"""A statistical certificate of stability, and how far one may compress (after COM-PACT).

The value gap W(s) = V_max - min Q(encoder(s), policy) of a fixed dense reference serves as the
Lyapunov candidate along closed-loop trajectories of the agent under test (COM-PACT: Lyapunov
criteria for a pruned TD-MPC agent). V_max, target set, sampling and boundary are ours. What comes
out holds with confidence for states drawn as they were drawn here; it is no proof.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest
from tabulate import tabulate

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.analysis.config import StabilityConfig
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import agent_size, evaluate
from tdmpc_prune.machine import measure_all, set_threads, versions
from tdmpc_prune.saving.agents import load_agent, load_agents, load_parent
from tdmpc_prune.saving.files import png
from tdmpc_prune.settings import to_plain
from tdmpc_prune.words import counted

_TOGETHER = 10  # episodes that are played at once
_WORSE = 0.05  # a reference that returns by this fraction less had learnt less
_CALIBRATION_SEED = 500_000  # added to the seed, so that the target set is of other episodes

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


@dataclass(frozen=True)
class Rate:
    """Successes of some independent trials, with an exact 95 % interval."""

    successes: int
    trials: int
    low: float
    high: float

    @staticmethod
    def of(outcomes: Sequence[bool]) -> Rate:
        return Rate.of_counts(int(np.sum(outcomes)), len(outcomes))

    @staticmethod
    def of_counts(successes: int, trials: int) -> Rate:
        if not trials:
            return Rate(0, 0, 0.0, 1.0)
        interval = binomtest(successes, trials).proportion_ci(0.95, method="exact")
        return Rate(successes, trials, float(interval.low), float(interval.high))

    @staticmethod
    def needed(low: float, trials: int) -> int | None:
        """The fewest successes with a lower end of at least `low`; None: not even all trials."""
        found = bisect_left(range(trials + 1), low, key=lambda k: Rate.of_counts(k, trials).low)
        return found if found <= trials else None

    @staticmethod
    def fewest(low: float) -> int:
        """The fewest trials that, all successes, have a lower end of at least `low`."""
        return math.ceil(math.log(0.025) / math.log(low))

    def __str__(self) -> str:
        if not self.trials:
            return "-"
        return f"{self.successes / self.trials:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Target:
    """The states near which the reference ends: those with W up to `level`."""

    largest_value: float  # V_max
    level: float
    hold: int  # decisions at the end of an episode in which it must not be left
    decisions: int  # of the reference's longest episode


@dataclass(frozen=True)
class Episodes:
    """What an agent did in some episodes from independent initial states."""

    values: list[np.ndarray]  # of the reference along each, `[T + 1]`
    terminated: list[bool]  # whether it ended for another reason than its time limit
    returns: list[float]


@dataclass(frozen=True)
class Judged:
    """What was found for one agent."""

    name: str
    folder: str
    sparsity: float
    parameters: int
    violations: int  # transitions outside the target set along which W did not decrease
    outside: int  # transitions outside the target set
    sampled: Rate  # of violations, one transition of each episode
    stayed: Rate  # episodes that reached the target set and stayed
    mean_return: float
    return_drop: float  # fraction of the dense agent's under the same conditions
    safe: bool


@dataclass(frozen=True)
class Stability:
    """The certificate, and the trajectories that it rests on."""

    reference: str  # folder
    target: Target
    judged: tuple[Judged, ...]  # by sparsity; the dense reference itself first
    boundary: Judged | None
    gaps: dict[str, list[np.ndarray]]  # name → W along each episode, `[T + 1]`


def judge(config: StabilityConfig) -> Stability:
    """Play, and judge every agent of `config.checkpoint`.

    Raises:
        UserError: there are too few episodes to call any agent safe, there is no such checkpoint,
            no dense agent to refer to, or agents are of different tasks.
        TaskError: there is no such body.
    """
    check_episodes(config)
    set_threads(config.threads)
    agents, reference = _agents(config)
    disturbances, calibration_seed = to_plain(config.disturb), config.seed + _CALIBRATION_SEED
    to_play = [(reference, calibration_seed, None), (reference, config.seed, disturbances)]
    to_play += [(agent, config.seed, disturbances) for agent in agents.values()]
    firsts = range(0, config.episodes, _TOGETHER)
    jobs = [
        partial(
            _play, agent, reference.model, min(_TOGETHER, config.episodes - first), s + first, d
        )
        for agent, s, d in to_play
        for first in firsts
    ]
    parts = measure_all(jobs, len(jobs), config.processes, config.threads, "playing")
    calibration, dense, *others = (
        _together(parts[i * len(firsts) : (i + 1) * len(firsts)]) for i in range(len(to_play))
    )
    target = target_of(calibration.values, config.hold, config.level)
    rng = np.random.default_rng(config.seed)
    mean = float(np.mean(dense.returns))
    judged = [
        assess(name, agent, episodes, mean, target, config, rng)
        for name, agent, episodes in zip(
            ("dense", *agents), (reference, *agents.values()), (dense, *others), strict=True
        )
    ]
    gaps = {
        one.name: [target.largest_value - value for value in episodes.values]
        for one, episodes in zip(judged, (dense, *others), strict=True)
    }
    judged[1:] = sorted(judged[1:], key=lambda one: one.sparsity)
    return Stability(
        reference=str(reference.folder),
        target=target,
        judged=tuple(judged),
        boundary=boundary(judged),
        gaps=gaps,
    )


def check_episodes(config: StabilityConfig) -> None:
    """Refuse so few episodes that no agent could be called safe.

    Raises:
        UserError: says how many it takes.
    """
    episodes, wanted = config.episodes, config.probability
    if Rate.needed(wanted, episodes) is None:
        fewest, low = Rate.fewest(wanted), Rate.of_counts(episodes, episodes).low
        raise UserError(
            f"episodes={episodes} cannot show probability={wanted:g}: if all {episodes} stay, the "
            f"lower 95 % end is {low:.3f}; give episodes={fewest} or more ({fewest} of {fewest})"
        )


def demand(config: StabilityConfig) -> str:
    """What an agent has to do to be called safe, in a sentence."""
    return (
        f"safe is an agent that stays in at least "
        f"{Rate.needed(config.probability, config.episodes)} of {config.episodes} episodes (lower "
        f"95 % end {config.probability:g}), with a return drop of at most "
        f"{config.max_return_drop:g}"
    )


def _agents(config: StabilityConfig) -> tuple[dict[str, Agent], Agent]:
    """The agents to judge, by name, and their dense reference."""
    given = [config.checkpoint] if isinstance(config.checkpoint, str) else config.checkpoint
    found: dict[str, Agent] = {}
    for path in given:
        for name, agent in load_agents(path).items():
            found[name if len(given) == 1 else f"{path}: {name}"] = agent
    first = next(iter(found.values()))
    for name, agent in found.items():
        if (agent.task, agent.action_repeat) != (first.task, first.action_repeat):
            raise UserError(f"'{name}' is for task={agent.task}, the others for {first.task}")
    agents = {name: agent for name, agent in found.items() if not agent.is_dense}
    if config.reference:
        reference = load_parent(first, config.reference)
        if not reference.is_dense:
            raise UserError(f"reference={config.reference} is pruned; it must be a dense agent")
        return agents, reference
    parents = {agent.parent.resolve() for agent in agents.values() if agent.parent}
    parents |= {agent.folder.resolve() for agent in found.values() if agent.is_dense}
    if len(parents) != 1:
        which = "several dense agents" if parents else "none"
        raise UserError(
            f"reference=… is needed: checkpoint={config.checkpoint} leads to {which} to refer to"
        )
    return agents, load_agent(parents.pop())


def _play(
    agent: Agent,
    reference: WorldModel,
    episodes: int,
    seed: int,
    disturbances: dict[str, Any] | None,
) -> Episodes:
    """Some episodes of an agent, and the reference's values along them."""
    observed: list[list[np.ndarray]] = [[] for _ in range(episodes)]
    terminated = [False] * episodes

    def watch(i: int, observation: np.ndarray, ended: bool) -> None:
        observed[i].append(observation)
        terminated[i] = ended

    evaluation = evaluate(
        agent.model,
        agent.config,
        agent.task,
        agent.action_repeat,
        episodes,
        seed,
        watch=watch,
        disturbances=disturbances,
    )
    values = [state_values(reference, np.stack(episode)) for episode in observed]
    return Episodes(values, terminated, evaluation.returns)


def _together(parts: list[Episodes]) -> Episodes:
    return Episodes(
        *([one for part in parts for one in getattr(part, f.name)] for f in fields(Episodes))
    )


@torch.no_grad()
def state_values(model: WorldModel, observations: np.ndarray) -> np.ndarray:
    """Observations `[T, O]` → min Q of the policy's action, `[T]`, float64."""
    latent = model.encode(torch.from_numpy(observations))
    return model.min_q(latent, model.act(latent)).double().numpy()


# --- The statistics --------------------------------------------------------------------------


def target_of(values: list[np.ndarray], hold: float, quantile: float) -> Target:
    """The target set, from the reference's own episodes.

    Args:
        values: of the reference along each of its episodes, `[T + 1]`.
        hold: fraction of an episode, at its end.
        quantile: fraction of the episodes whose end lies within the level.
    """
    largest = max(float(value.max()) for value in values)
    decisions = max(len(value) for value in values) - 1
    held = max(1, round(hold * decisions))
    ends = [largest - float(value[-held:].min()) for value in values]
    return Target(largest, float(np.quantile(ends, quantile)), held, decisions)


def violations(gap: np.ndarray, level: float) -> np.ndarray:
    """For each transition that starts outside the target set: whether W failed to decrease."""
    outside = gap[:-1] > level
    return (gap[1:] >= gap[:-1])[outside]


def stays(gap: np.ndarray, terminated: bool, target: Target) -> bool:
    """Whether an episode enters the target set and is in it until its time limit."""
    whole = not terminated and len(gap) > target.hold
    return whole and bool((gap[-target.hold :] <= target.level).all())


def boundary(judged: list[Judged]) -> Judged | None:
    """The sparsest agent that is safe; None if there is none."""
    return max((one for one in judged if one.safe), key=lambda one: one.sparsity, default=None)


def assess(
    name: str,
    agent: Agent,
    episodes: Episodes,
    dense: float,
    target: Target,
    config: StabilityConfig,
    rng: np.random.Generator,
) -> Judged:
    """Judge an agent by its episodes.

    Args:
        name: of the agent.
        agent: for its size and folder alone.
        episodes: of it.
        dense: mean return of the dense agent under the same conditions.
        target: the target set.
        config: required probability, tolerated drop.
        rng: draws one transition of each episode.
    """
    gaps = [target.largest_value - value for value in episodes.values]
    failed = [violations(gap, target.level) for gap in gaps]
    one_each = [bool(rng.choice(outcomes)) for outcomes in failed if len(outcomes)]
    ends = zip(gaps, episodes.terminated, strict=True)
    stayed = Rate.of([stays(gap, terminated, target) for gap, terminated in ends])
    mean = float(np.mean(episodes.returns))
    drop = (dense - mean) / abs(dense) if dense else float(mean < dense)
    size = agent_size(agent.model, agent.config)
    return Judged(
        name=name,
        folder=str(agent.folder),
        sparsity=size["sparsity"],
        parameters=size["parameters"],
        violations=int(sum(outcomes.sum() for outcomes in failed)),
        outside=sum(len(outcomes) for outcomes in failed),
        sampled=Rate.of(one_each),
        stayed=stayed,
        mean_return=mean,
        return_drop=drop,
        safe=stayed.low >= config.probability and drop <= config.max_return_drop,
    )


# --- Showing it ------------------------------------------------------------------------------


def certificate(found: Stability, config: StabilityConfig) -> dict[str, Any]:
    """All that is claimed, and what it rests on; JSON types."""
    return {
        "format": "tdmpc_prune stability certificate",
        "assumptions": ASSUMPTIONS,
        "reference": found.reference,
        "target": asdict(found.target),
        "episodes": {"calibration": config.episodes, "each agent": config.episodes},
        "seeds": {"calibration": config.seed + _CALIBRATION_SEED, "each agent": config.seed},
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
    table = tabulate(rows, names, "pipe", disable_numparse=True)
    disturbed = {name: value for name, value in to_plain(config.disturb).items() if value}
    conditions = f"disturbed by {disturbed}" if disturbed else "undisturbed"
    return (
        f"{counted(config.episodes, 'episode')} of each agent, {conditions}; target set: W <= "
        f"{found.target.level:.3g} (V_max {found.target.largest_value:.4g}), to be kept for the "
        f"last {found.target.hold} of {found.target.decisions} decisions\n\n{table}\n\n"
        f"{verdict(found, config)}{_doubt(found)}{_weakness(found)}"
    )


def weaker_than(found: Stability) -> list[Judged]:
    """The agents that return noticeably more than the dense reference that they are judged by."""
    dense = found.judged[0].mean_return
    return [one for one in found.judged[1:] if one.mean_return - dense > _WORSE * abs(dense)]


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
    least = dense - config.max_return_drop * abs(dense)
    bottom.axhline(least, color="C3", linestyle="--", label="least return")
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
