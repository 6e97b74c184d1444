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
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.deciding import choose
from tdmpc_prune.agent.world_model import WorldModel
from tdmpc_prune.analysis.config import StabilityConfig
from tdmpc_prune.errors import UserError
from tdmpc_prune.evaluation import evaluate
from tdmpc_prune.machine import measure_all, set_threads
from tdmpc_prune.saving.agents import load_agent, load_agents, load_parent
from tdmpc_prune.settings import to_plain

_TOGETHER = 10  # episodes of one job, which PyTorch plays at once
_WORSE = 0.05  # a reference that returns by this fraction less had learnt less
CALIBRATION_SEED = 500_000  # added to the seed, so that the target set is of other episodes


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
    decisions: str  # by whom: "native" or "torch"


@dataclass(frozen=True)
class Judged:
    """What was found for one agent."""

    name: str
    folder: str
    sparsity: float
    parameters: int
    decisions: str  # by whom: "native" or "torch"
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
    disturbances, calibration_seed = to_plain(config.disturb), config.seed + CALIBRATION_SEED
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
    agents: dict[str, Agent] = {}
    for name, agent in found.items():
        # A run that ends with a cut keeps the same agent twice, as the cut's and as its last.
        if not agent.is_dense and not any(map(partial(_alike, agent), agents.values())):
            agents[name] = agent
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


def _alike(one: Agent, other: Agent) -> bool:
    """Whether two agents decide alike: the same networks and the same planner."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return (
        one.config == other.config
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


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

    path = choose("auto", agent.dense_widths, agent.device).path
    evaluation = evaluate(
        agent, episodes, seed, watch=watch, disturbances=disturbances, decisions=path
    )
    values = [state_values(reference, np.stack(episode)) for episode in observed]
    return Episodes(values, terminated, evaluation.returns, path)


def _together(parts: list[Episodes]) -> Episodes:
    return Episodes(
        values=[one for part in parts for one in part.values],
        terminated=[one for part in parts for one in part.terminated],
        returns=[one for part in parts for one in part.returns],
        decisions=parts[0].decisions,
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
    size = agent.size()
    return Judged(
        name=name,
        folder=str(agent.folder),
        sparsity=size["sparsity"],
        parameters=size["parameters"],
        decisions=episodes.decisions,
        violations=int(sum(outcomes.sum() for outcomes in failed)),
        outside=sum(len(outcomes) for outcomes in failed),
        sampled=Rate.of(one_each),
        stayed=stayed,
        mean_return=mean,
        return_drop=drop,
        safe=stayed.low >= config.probability and drop <= config.max_return_drop,
    )


def weaker_than(found: Stability) -> list[Judged]:
    """The agents that return noticeably more than the dense reference that they are judged by."""
    dense = found.judged[0].mean_return
    return [one for one in found.judged[1:] if one.mean_return - dense > _WORSE * abs(dense)]
