"""Everything that can be set about an analysis: groups, coefficients, sensitivity, studies, …"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from omegaconf import MISSING

from tdmpc_prune.agent.config import (
    PRESETS,
    AgentConfig,
    LearningConfig,
    NetworkConfig,
    PlannerConfig,
)
from tdmpc_prune.analysis.arms import ARMS, DENSE, REINITIALISED, SMALL, STUDENT
from tdmpc_prune.envs import task_name
from tdmpc_prune.pruning.config import ALLOCATIONS, TRACKED, PruneConfig
from tdmpc_prune.settings import (
    RUN_OR_CHECKPOINT,
    Choice,
    Idle,
    among,
    check_machine,
    require,
    setting,
)

# What has no effect where units are only ranked, and where a dense agent is only counted.
_OF_CUTS = (
    *("sparsity", "start", "end", "steps", "shape", "allocation", "round_to", "budgets"),
    *("distil", "max_return_drop", "eval_episodes", "plan"),
)

_FLOORS = ("min_width", "min_widths", "protect")

_NOT_COUNTED = (
    *("learning", "planner.temperature", "planner.momentum", "planner.min_std"),
    *("planner.max_std", "planner.start_std", "planner.start_horizon"),
    *("planner.schedule_decisions", "planner.policy_noise", "planner.policy_noise_clip"),
)


@dataclass(frozen=True)
class GroupsConfig:
    """A look at an agent's groups."""

    checkpoint: str | None = setting(
        None, f"{RUN_OR_CHECKPOINT}; null takes a dense agent for `task`", positional=True
    )
    task: str = setting("cartpole-swingup", "whose observations and actions a dense agent gets")
    model: AgentConfig = setting(
        AgentConfig, "the dense agent", choices=PRESETS, unused=_NOT_COUNTED
    )
    json: str | None = setting(None, "file to write the groups to")

    def __post_init__(self):
        object.__setattr__(self, "task", task_name(self.task))

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        name = among(given, "task", "model", "model.")
        return Idle(name, "with checkpoint=…") if name and self.checkpoint else None


COEFFICIENT_METHODS = ("gradient", "grid", "global", "uniform")


@dataclass(frozen=True)
class SearchConfig:
    """How coefficients are searched for, whether one search is made or several are compared."""

    tolerance: float = setting(0.01, "by which the sparsity may be exceeded")
    largest: float = setting(0.8, "coefficient that a group may have (c_max)")
    budget: int = setting(100, "grid: most evaluations of the score")
    steps: int = setting(400, "gradient: steps of the descent, each on the loss of one batch")
    fine_tuning: int = setting(500, "after the cut: updates, or an agent's env steps")
    episodes: int = setting(5, "of an agent: per measurement of its return")
    prune: PruneConfig = setting(
        lambda: PruneConfig(method="bayesian", min_width=2),
        "how units are ranked, and floors",
        choices=TRACKED,
        unused=(*_OF_CUTS, "rotate", "compare"),
    )
    seed: int = setting(1, "of the batches")
    threads: int = setting(1, "CPU threads")

    def __post_init__(self):
        require(0 < self.tolerance < 1, f"tolerance={self.tolerance} must lie in (0, 1)")
        require(0 < self.largest <= 1, f"largest={self.largest} must lie in (0, 1]")
        require(self.episodes >= 1, f"episodes={self.episodes} must be at least 1")
        require(self.budget >= 1, f"budget={self.budget} must be at least 1")
        require(self.steps >= 2, f"steps={self.steps} must be at least 2")
        require(self.fine_tuning >= 0, f"fine_tuning={self.fine_tuning} cannot be negative")
        require(
            self.prune.method != "none", "prune=none ranks nothing; choose what ranks the units"
        )
        require(not self.prune.budgets, "prune.budgets is not known to a search for coefficients")
        check_machine("cpu", self.threads)


@dataclass(frozen=True)
class CoefficientsConfig(SearchConfig):
    """A search for how much to take from each group."""

    checkpoint: str = setting(
        MISSING, f"{RUN_OR_CHECKPOINT}, of an agent or an autoencoder", positional=True
    )
    method: str = setting(
        "gradient",
        "gradient, or grid: search for the coefficients; or, to compare, global or uniform",
    )
    sparsity: float = setting(0.8, "fraction of its parameters that is to go")
    out: str | None = setting(
        None,
        "file for the plan; null takes <method>-<sparsity>.json in the run's folder. Results go "
        "beside it",
    )

    def __post_init__(self):
        require(
            self.method in COEFFICIENT_METHODS,
            f"method={self.method} must be one of {', '.join(COEFFICIENT_METHODS)}",
        )
        require(0 < self.sparsity < 1, f"sparsity={self.sparsity} must lie in (0, 1)")
        super().__post_init__()

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        for name, method in (("budget", "grid"), ("steps", "gradient")):
            if name in given and self.method != method:
                return Idle(name, f"with method={self.method}", f"method={method}")
        return None


@dataclass(frozen=True)
class CompareCoefficientsConfig(SearchConfig):
    """A comparison of ways to choose how much to take from each group, at equal sparsity."""

    checkpoint: list[str] = setting(
        MISSING,
        "folders of runs, or checkpoints, such as one for each seed: [a, b]",
        positional=True,
        formerly="checkpoints",
    )
    sparsities: list[float] = setting(lambda: [0.5, 0.8, 0.9], "at which to compare")
    prune: PruneConfig = setting(
        lambda: PruneConfig(method="bayesian", min_width=2),
        "floors; every arm has its own ranking",
        unused=("method", *_OF_CUTS, "rotate", "compare"),
    )
    out: str = setting("coefficients", "of the files <out>.md and <out>.csv")

    def __post_init__(self):
        require(self.checkpoint != [], "checkpoint=[] names none")
        require(self.sparsities != [], "sparsities=[] names none")
        for sparsity in self.sparsities:
            require(0 < sparsity < 1, f"sparsity={sparsity} must lie in (0, 1)")
        super().__post_init__()


@dataclass(frozen=True)
class SensitivityConfig:
    """A measurement of what each group of a network is worth."""

    checkpoint: str = setting(
        MISSING, f"{RUN_OR_CHECKPOINT}, of an agent or an autoencoder", positional=True
    )
    fractions: list[float] = setting(
        lambda: [0.25, 0.5, 0.75], "of each group's units to remove, ascending"
    )
    groups: list[str] = setting(list, "names of the groups; none takes all, see groups.py")
    episodes: int = setting(3, "of an agent: per removal")
    prune: PruneConfig = setting(
        lambda: PruneConfig(method="bayesian"),
        "which metric ranks the units, and how it is got",
        choices=TRACKED,
        unused=(*_OF_CUTS, *_FLOORS, "refit", "rotate"),
    )
    processes: int = setting(2, "that measure at the same time")
    seed: int = setting(1, "of batches and of the random order")
    threads: int = setting(1, "CPU threads of each process")
    out: str | None = setting(
        None,
        "of the files <out>.png, <out>.md and <out>.json; null takes sensitivity in the run's "
        "folder",
    )

    def __post_init__(self):
        ends = [0.0, *self.fractions, 1.0]
        require(
            len(ends) > 2 and all(a < b for a, b in pairwise(ends)),
            f"fractions={list(self.fractions)} must ascend between 0 and 1",
        )
        require(len(set(self.groups)) == len(self.groups), f"groups={self.groups} repeats one")
        for name in ("episodes", "processes"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        require(
            self.prune.method != "none", "prune=none ranks nothing; choose what ranks the units"
        )
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31)")
        check_machine("cpu", self.threads)


@dataclass(frozen=True)
class DisturbConfig:
    """What is different from the task as it was learnt; see `envs.disturb`."""

    observation_noise: float = setting(0.0, "standard deviation, in each observation's own units")
    action_noise: float = setting(0.0, "standard deviation, where actions go from -1 to 1")
    action_delay: int = setting(0, "decisions by which every action comes late")
    mass: dict[str, float] = setting(dict, "body → factor on its mass: {pole_1: 1.5}")

    def __post_init__(self):
        for name in ("observation_noise", "action_noise", "action_delay"):
            value = getattr(self, name)
            require(value >= 0, f"disturb.{name}={value} cannot be negative")
        for body, factor in self.mass.items():
            require(factor > 0, f"disturb.mass: {body}={factor} must be positive")


@dataclass(frozen=True)
class StabilityConfig:
    """A statistical certificate of stability."""

    checkpoint: Any = setting(
        MISSING,
        f"{RUN_OR_CHECKPOINT}, or several: [a, b]; of a pruning run all agents",
        positional=True,
    )
    reference: str | None = setting(
        None, "dense agent whose value gap is used; null takes the one that the checkpoint names"
    )
    episodes: int = setting(100, "of each agent, and to calibrate the target set")
    level: float = setting(
        0.99, "fraction of the reference's own episodes whose end defines the target set"
    )
    hold: float = setting(0.25, "fraction of an episode, at its end, in the target set")
    probability: float = setting(0.9, "of reaching it and staying, required of the lower bound")
    max_return_drop: float = setting(0.05, "fraction of the dense agent's return, at most")
    disturb: DisturbConfig = setting(DisturbConfig, "what is different from the task as learnt")
    processes: int = setting(2, "that play at the same time")
    seed: int = setting(0, "of initial states, planner noise and disturbances")
    threads: int = setting(1, "CPU threads")
    out: str | None = setting(
        None,
        "of <out>.json, <out>-gap.csv and .png, and <out>-boundary.png; null takes stability in "
        "the run's folder, or here for several",
    )

    def __post_init__(self):
        paths = [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint
        require(
            isinstance(paths, list) and len(paths) > 0 and all(isinstance(p, str) for p in paths),
            f"checkpoint={self.checkpoint} must be a folder, or a list of them: [a, b]",
        )
        require(self.episodes >= 2, f"episodes={self.episodes} must be at least 2")
        require(self.processes >= 1, f"processes={self.processes} must be at least 1")
        for name in ("level", "hold", "probability"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name}={value} must lie in (0, 1)")
        require(
            0 <= self.max_return_drop < 1,
            f"max_return_drop={self.max_return_drop} must lie in [0, 1)",
        )
        require(0 <= self.seed < 2**30, f"seed={self.seed} must lie in [0, 2^30)")
        check_machine("cpu", self.threads)


@dataclass(frozen=True)
class ImportanceConfig:
    """A look at how importance moved during a pruning run."""

    checkpoint: str = setting(
        MISSING,
        "a pruning run's folder, of an agent or an autoencoder, or a checkpoint in it",
        positional=True,
        formerly="run",
    )
    out: str | None = setting(
        None,
        "of the files <out>.png, <out>.md and <out>.csv; null takes importance in the run's folder",
    )


@dataclass(frozen=True)
class StudyConfig:
    """A comparison of ways to prune: tasks × arms × sparsities × seeds."""

    tasks: list[str] = setting(
        lambda: ["cartpole-swingup", "walker-walk", "cheetah-run", "reacher-easy"], "the tasks"
    )
    arms: list[str] = setting(lambda: list(ARMS), f"of {', '.join(ARMS)}")
    sparsities: list[float] = setting(
        lambda: [0.8, 0.9, 0.95, 0.98], "fractions of the parameters that go, in one cut"
    )
    seeds: list[int] = setting(lambda: [1, 2, 3, 4, 5], "each with a dense agent of its own")
    dense: str | None = setting(
        None,
        "folder of dense runs to start from, <dense>/<task>/none/seed<seed>; null trains them",
    )
    start_env_steps: int = setting(50_000, "training of the dense agents before the cut")
    env_steps: int = setting(
        6_000,
        "training after it; small ones from scratch get both; 0 reads agents right after the cut",
    )
    eval_every: int = setting(1_000, "env steps between evaluations after the cut")
    episodes: int = setting(5, "per evaluation on the way")
    final_episodes: int = setting(
        20, "right after the cut, and at the end; from initial states that nothing was chosen by"
    )
    allocation: str = setting("balanced", f"of the cuts: {', '.join(ALLOCATIONS)}")
    min_width: int = setting(2, "units that every group keeps at least")
    model: AgentConfig = setting(AgentConfig, "the dense agents")
    device: str = setting("cpu", "auto, cpu or cuda")
    out: str = setting("studies/full", "folder of the jobs and of the results")

    def __post_init__(self):
        object.__setattr__(self, "tasks", [task_name(task) for task in self.tasks])
        for arm in self.arms:
            require(arm in ARMS, f"study.arms: '{arm}' must be one of {', '.join(ARMS)}")
        check_machine(self.device, threads=1)
        for seed in self.seeds:
            require(seed >= 0, f"study.seeds: {seed} cannot be negative")
        for name in ("tasks", "arms", "sparsities", "seeds"):
            values = getattr(self, name)
            require(len(values) > 0, f"study.{name} is empty")
            require(len(set(values)) == len(values), f"study.{name}={values} repeats a value")
        allocation = self.allocation
        known = ", ".join(ALLOCATIONS)
        require(allocation in ALLOCATIONS, f"study.allocation={allocation} must be one of {known}")
        for sparsity in self.sparsities:
            require(0 < sparsity < 1, f"study.sparsities: {sparsity} must lie in (0, 1)")
        require(self.env_steps >= 0, f"study.env_steps={self.env_steps} cannot be negative")
        counts = ("start_env_steps", "eval_every", "episodes", "final_episodes", "min_width")
        for name in counts:
            value = getattr(self, name)
            require(value >= 1, f"study.{name}={value} must be at least 1")


_QUICK = StudyConfig(
    tasks=["cartpole-balance"],
    arms=[
        *(DENSE, SMALL, STUDENT, REINITIALISED, "random", "bayesian", "bayesian refitted"),
        "compensated",
    ],
    sparsities=[0.9],
    seeds=[1, 2],
    start_env_steps=10_000,
    env_steps=3_000,
    episodes=3,
    model=AgentConfig(
        network=NetworkConfig(encoder_width=48, latent_width=16, hidden_width=48),
        planner=PlannerConfig(samples=64, elites=16, iterations=4, schedule_decisions=1_000),
        learning=LearningConfig(seed_decisions=250, updates_per_decision=1.0, batch=128),
    ),
    out="studies/quick",
)

STUDIES = {
    "full": Choice(StudyConfig(), "four tasks, every arm, four sparsities, five seeds"),
    "quick": Choice(_QUICK, "one task, eight arms, one sparsity, two seeds, small networks"),
}


@dataclass(frozen=True)
class StudyCommand:
    """The whole study, or one of its jobs, or the report of one that was run."""

    study: StudyConfig = setting(
        StudyConfig,
        "what is compared",
        choices=STUDIES,
    )
    job: int | None = setting(None, "number of the one job to run; null runs all, and reports")
    report: str | None = setting(
        None,
        "results.csv of a study: nothing is run, its tables and pictures are made again beside it",
    )

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        name = among(given, "study", "study.", "job")
        if name and self.report:
            return Idle(name, "with report=…, which runs nothing")
        if "study.start_env_steps" in given and self.study.dense:
            return Idle("study.start_env_steps", "with study.dense=…, whose agents are trained")
        if "study.eval_every" in given and not self.study.env_steps:
            return Idle("study.eval_every", "with study.env_steps=0")
        return None
