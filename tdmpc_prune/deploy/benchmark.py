"""How long a decision and an update take, beside what their arithmetic alone would take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from tdmpc_prune.agent.agent import Agent
from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.config import PRESETS, AgentConfig
from tdmpc_prune.agent.controller import CPU_MS, clock, decision_milliseconds, median_and_p95
from tdmpc_prune.agent.learner import Learner
from tdmpc_prune.agent.planner import draw_noise, first_means, plan
from tdmpc_prune.agent.replay import Episode, SequenceReplay
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.deploy import playing
from tdmpc_prune.deploy.candidates import Candidates, measure_candidates
from tdmpc_prune.deploy.card import recorded_returns
from tdmpc_prune.envs import make_env
from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.allocation import make_plan
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.importance import Tracker
from tdmpc_prune.pruning.surgery import commit, kept_units
from tdmpc_prune.words import counted, table

_SQUARE = 512  # side of the matrices whose product gives the machine's rate
_WARM_UP = 3


@dataclass(frozen=True)
class Measurement:
    """One thing measured. The floor is its matrix products' operations over the machine's rate."""

    what: str
    milliseconds: float  # median
    floor_milliseconds: float
    gflop: float  # of matrix products, one multiply-accumulate counted as two

    @property
    def times_floor(self) -> float:
        return self.milliseconds / self.floor_milliseconds


@dataclass(frozen=True)
class PruningCost:
    """What pruning adds to training. Trackers are timed inside the updates that they watch."""

    update_milliseconds: float  # median, without the trackers
    one_metric_milliseconds: float  # median per update: `bayesian` alone
    all_metrics_milliseconds: float
    cut_seconds: float  # plan, commit, verification by tracing, bookkeeping: half the parameters

    def text(self) -> str:
        one, every = (
            f"{ms:.2f} ms ({ms / self.update_milliseconds:.1%} of an update)"
            for ms in (self.one_metric_milliseconds, self.all_metrics_milliseconds)
        )
        return (
            f"importance tracker: {one} with one metric, {every} with all\n"
            f"a cut of half the parameters: {self.cut_seconds:.2f} s with its bookkeeping"
        )


@dataclass(frozen=True)
class Benchmark:
    """Measurements of one model on one machine."""

    device: str
    threads: int
    parameters: int
    gflops: float  # measured rate of a 512 x 512 float32 product
    measurements: list[Measurement]
    pruning: PruningCost

    def table(self) -> str:
        """The measurements as Markdown."""
        lines = [
            f"{self.parameters} parameters, {self.device}, {counted(self.threads, 'thread')}, "
            f"{self.gflops:.0f} GFLOP/s in a {_SQUARE} x {_SQUARE} product",
            "",
            "| | ms (median) | floor, ms | times the floor | GFLOP |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {m.what} | {m.milliseconds:.2f} | {m.floor_milliseconds:.2f} "
            f"| {m.times_floor:.1f} | {m.gflop:.3f} |"
            for m in self.measurements
        ]
        return "\n".join([*lines, "", self.pruning.text()])

    def as_json(self) -> dict[str, Any]:
        measurements = [asdict(m) | {"times_floor": m.times_floor} for m in self.measurements]
        return asdict(self) | {"measurements": measurements}


def benchmark(
    config: AgentConfig, task: str, environments: int, repeats: int, device: torch.device
) -> Benchmark:
    """Time decisions and updates of a freshly initialised agent.

    Args:
        config: the agent.
        task: whose observation and action widths are used; nothing is simulated.
        environments: decisions planned at once.
        repeats: timed calls of each; the machine's rate is measured before and after them.
        device: where.
    """
    env = make_env(task)
    observation, action = env.observation_space.shape[0], env.action_space.shape[0]
    env.close()
    generator = torch.Generator(device).manual_seed(0)
    model = WorldModel(Widths.dense(config.network, observation, action)).to(device)
    decide, learner = plan, Learner(model, config.planner, config.learning)
    if device.type == "cuda":
        decide = torch.compile(plan, mode="reduce-overhead")

    def decision() -> None:
        noise = draw_noise(config.planner, environments, action, generator)
        with torch.no_grad():
            decide(model, observations, means, noise, config.planner, config.learning.discount)

    observations = torch.zeros(environments, observation, device=device)
    means = first_means(config.planner, environments, action, device)
    batch, _ = _filled_replay(config, observation, action).sample(
        config.learning.batch, np.random.default_rng(0), device
    )
    what = {
        f"decision ({environments} at once)" if environments > 1 else "decision": decision,
        "update": lambda: learner.update(batch, generator),
    }
    before = _matrix_rate(device)
    timed = {name: _median_milliseconds(call, repeats, device) for name, call in what.items()}
    rate = statistics.median([before, _matrix_rate(device)])
    floors = [
        Measurement(name, timed[name], 1000 * flop / rate, flop)
        for name, flop in ((name, _gflop(call)) for name, call in what.items())
    ]
    return Benchmark(
        device=str(device),
        threads=torch.get_num_threads(),
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=rate,
        measurements=floors,
        pruning=_pruning_cost(learner, config, lambda: learner.update(batch, generator), repeats),
    )


@dataclass(frozen=True)
class Gain:
    """A pruned or fitted agent beside its dense parent with the published planner budget."""

    dense_ms: list[float]  # single decisions, in turn with the other's
    ms: list[float]
    dense_returns: list[float]
    returns: list[float]
    dense_played: bool  # else its returns are the ones on file
    candidates: Candidates | None  # every way to decide, on a CPU

    @property
    def times_faster(self) -> float:
        """Ratio of the medians."""
        return statistics.median(self.dense_ms) / statistics.median(self.ms)

    def text(self) -> str:
        dense_return = np.mean(self.dense_returns)
        share = f", with {np.mean(self.returns) / dense_return:.1%} of the return"
        rows = [
            (
                name,
                f"{median:.2f}",
                f"{p95:.2f}",
                f"{np.mean(returns):.1f} ± {np.std(returns):.1f}",
                f"{len(returns)} {'played' if played else 'on file, with the planner of its own'}",
            )
            for name, (median, p95), returns, played in (
                (
                    "dense",
                    median_and_p95(self.dense_ms),
                    self.dense_returns,
                    self.dense_played,
                ),
                ("this agent", median_and_p95(self.ms), self.returns, True),
            )
        ]
        names = ["", f"{CPU_MS}, median", "95 %", "return", "episodes"]
        return (
            f"{table(rows, names)}\n\n"
            f"in PyTorch {self.times_faster:.1f} times as fast{share if dense_return > 0 else ''}"
            + (f"\n\n{self.candidates.text()}" if self.candidates else "")
        )

    def as_json(self) -> dict[str, Any]:
        candidates = self.candidates.as_json() if self.candidates else None
        return asdict(self) | {"times_faster": self.times_faster, "candidates": candidates}


def gain(agent: Agent, parent: Agent, episodes: int, seed: int, repeats: int) -> Gain:
    """Time an agent and its dense parent side by side, and play both.

    Args:
        agent: pruned or fitted, with its own planner budget.
        parent: dense; it gets the published planner.
        episodes: of the agent and of its parent; 0 takes the parent's return on file, and as many
            episodes of the agent as it has.
        seed: of the initial states.
        repeats: timed decisions of each, in turn.

    Raises:
        UserError: nothing is to be played, and the parent has no return on file.
    """
    dense = parent.with_planner(PRESETS["paper"].value.planner)
    recorded = recorded_returns(parent)
    if not episodes and not recorded:
        raise UserError("episodes=0, but the dense parent has no return on file")
    dense_ms, ms = decision_milliseconds(dense, agent, repeats=repeats, decisions="torch")
    played = playing.measure(agent, episodes or len(recorded), seed)
    dense_returns = playing.measure(dense, episodes, seed).returns if episodes else recorded
    candidates = None
    if agent.device.type == "cpu":
        candidates = measure_candidates(agent, dense, repeats)
    return Gain(dense_ms, ms, dense_returns, played.returns, episodes > 0, candidates)


def _pruning_cost(
    learner: Learner, config: AgentConfig, update: Callable[[], object], repeats: int
) -> PruningCost:
    """Both trackers watch the same updates; then half of the parameters are cut."""
    ties = agent_computation(learner.model, learner.target, config)
    structure = find_groups(ties)
    one, every = (
        Tracker(structure, learner.model, PruneConfig(method="bayesian", compare=compare), seed=0)
        for compare in (False, True)
    )
    spent = {"one": 0.0, "every": 0.0}

    def timed(name: str, tracker: Tracker):
        def hook(loss, parameters) -> None:
            _wait(learner.device)
            began = time.perf_counter()
            tracker(loss, parameters)
            _wait(learner.device)
            spent[name] += 1000 * (time.perf_counter() - began)

        return hook

    learner.gradient_hooks += [timed("one", one), timed("every", every)]
    rows = []
    for _ in range(_WARM_UP + repeats):
        spent.update(one=0.0, every=0.0)
        began = time.perf_counter()
        update()
        _wait(learner.device)
        whole = 1000 * (time.perf_counter() - began)
        rows.append((whole - sum(spent.values()), spent["one"], spent["every"]))
    learner.gradient_hooks.clear()

    began = time.perf_counter()
    settings, dense = PruneConfig(method="bayesian", min_width=1), structure.parameters()
    cut = make_plan(structure, one.densities("bayesian", learner.model), settings, 0.5, dense)
    left = commit(cut, structure, ties, learner.optimisers.values())
    for tracker in (one, every):
        tracker.keep(kept_units(cut), left, learner.model)
    _wait(learner.device)
    seconds = time.perf_counter() - began
    return PruningCost(*map(statistics.median, zip(*rows[_WARM_UP:], strict=True)), seconds)


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _filled_replay(config: AgentConfig, observation: int, action: int) -> SequenceReplay:
    rng = np.random.default_rng(0)
    learning = config.learning
    length = 10 * learning.horizon
    replay = SequenceReplay.of(learning, observation, action, capacity=length)
    replay.add(
        Episode(
            rng.normal(size=(length + 1, observation)).astype(np.float32),
            rng.uniform(-1, 1, (length, action)).astype(np.float32),
            rng.random(length).astype(np.float32),
            terminated=False,
        )
    )
    return replay


def _gflop(call: Callable[[], None]) -> float:
    """Operations of the matrix products that a call makes, counted while it runs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def _matrix_rate(device: torch.device) -> float:
    """GFLOP/s of a float32 matrix product."""
    matrix = torch.randn(_SQUARE, _SQUARE, device=device)
    milliseconds = _median_milliseconds(lambda: matrix @ matrix, 50, device)
    return 2 * _SQUARE**3 / milliseconds / 1e6


def _median_milliseconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    times, now = [], clock(device)
    for i in range(_WARM_UP + repeats):
        began = now()
        call()
        _wait(device)
        if i >= _WARM_UP:
            times.append(1000 * (now() - began))
    return statistics.median(times)
