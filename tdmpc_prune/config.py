"""What can be set on each command line, and the named choices that Hydra offers for it.

The dataclasses are the only declaration of a setting: its type, default and documentation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from envs import task_name
from tdmpc_prune.agent.config import PRESETS, AgentConfig, PlannerConfig
from tdmpc_prune.agent.config import LearningConfig as AgentLearningConfig
from tdmpc_prune.agent.config import NetworkConfig as AgentNetworkConfig
from tdmpc_prune.autoencoder.config import DATA, DataConfig
from tdmpc_prune.autoencoder.config import LearningConfig as AutoencoderLearningConfig
from tdmpc_prune.autoencoder.config import NetworkConfig as AutoencoderNetworkConfig
from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.config import ALLOCATIONS, METRICS, PruneConfig
from tdmpc_prune.settings import Idle, among, require, setting

RUN_OR_CHECKPOINT = "a run's folder (its newest checkpoint), or a checkpoint"
MODELS = {
    "default": "128 wide, 256 samples: for one CPU core",
    "paper": "as published, 512 wide and 512 samples",
}
RANKINGS = {
    "bayesian": "upper credible bound of the energy of gradient × weight",
    "fisher": "squared gradients",
    "fisher_increase": "squared gradient × weight: what a removal would change",
    "gradient": "absolute gradients",
    "taylor": "absolute gradient × weight",
    "magnitude": "norm of the weights",
    "random": "chance, to compare with",
}
METHODS = {"none": "nothing is cut, the networks stay dense"} | RANKINGS
IMAGES = {"digits": "8 × 8, ship with scikit-learn", "mnist": "28 × 28, from data.dir"}

# What has no effect where units are only ranked, and where a dense agent is only counted.
_OF_CUTS = (
    *("sparsity", "start", "end", "steps", "shape", "allocation", "round_to", "budgets"),
    *("max_return_drop", "eval_episodes", "plan"),
)
_FLOORS = ("min_width", "min_widths", "protect")
_NOT_COUNTED = (
    *("learning", "planner.temperature", "planner.momentum", "planner.min_std"),
    *("planner.max_std", "planner.start_std", "planner.start_horizon"),
    *("planner.schedule_decisions", "planner.policy_noise", "planner.policy_noise_clip"),
)


def _clipped(config: Any, eval_episodes: int, given: Sequence[str]) -> Idle | None:
    """Episodes around a cut that are more than an evaluation has."""
    if "prune.eval_episodes" in given and config.prune.eval_episodes > eval_episodes:
        return Idle(
            "prune.eval_episodes",
            f"above eval_episodes={eval_episodes}",
            f"eval_episodes={config.prune.eval_episodes}",
        )
    return None


def _not_gathered(config: Any, given: Sequence[str]) -> Idle | None:
    """Gradients are gathered only where nothing is learnt before the first cut."""
    name = among(given, "prune.gather_updates", "prune.gather_episodes")
    if name and not config.start_from:
        return Idle(name, "in a run from scratch, which gathers gradients while it learns")
    return None


def _not_pruned(config: Any, given: Sequence[str]) -> Idle | None:
    """Settings of a pruning where there is none."""
    name = among([name for name in given if name != "prune.method"], "prune.")
    if name and config.prune.method == "none":
        return Idle(name, "without prune=…", "prune=bayesian")
    return None


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    task: str = setting(
        "cartpole-swingup", "a DeepMind Control Suite task, or gym:<id> for any Gymnasium one"
    )
    prune: PruneConfig = setting(
        PruneConfig, "whether and how to compress while training", choices=METHODS
    )
    seed: int = setting(1, "of everything random")
    env_steps: int = setting(50_000, "length of the training, in simulator steps")
    run_dir: str | None = setting(
        None, "folder of the run; null takes runs/<task>/<prune>/seed<seed>"
    )
    model: AgentConfig = setting(AgentConfig, "the agent", choices=MODELS)
    resume: str | None = setting(
        None, "folder of a run to go on with; only env_steps, device and threads may be changed"
    )
    start_from: str | None = setting(
        None, "checkpoint to start from, see scripts/prune.py; env_steps goes on from its count"
    )
    eval_every: int = setting(5_000, "env steps between evaluations, each saved as a checkpoint")
    eval_episodes: int = setting(10, "episodes per evaluation")
    action_repeat: int | None = setting(
        None, "simulator steps per decision; null takes the task's own"
    )
    device: str = setting("auto", "auto, cpu or cuda; auto takes CUDA where there is a GPU")
    threads: int = setting(1, "CPU threads; more only helps while other processes leave cores idle")

    def __post_init__(self):
        object.__setattr__(self, "task", task_name(self.task))  # one task, one name
        for name in ("env_steps", "eval_every", "eval_episodes"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31)")
        check_machine(self.device, self.threads)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        if self.resume:
            return None  # what may be given beside it is checked there
        return (
            _not_pruned(self, given)
            or _not_gathered(self, given)
            or self.prune.idle(given)
            or _clipped(self, self.eval_episodes, given)
        )


@dataclass(frozen=True)
class AutoencoderConfig:
    """A training run of an autoencoder."""

    data: DataConfig = setting(DataConfig, "the images", choices=IMAGES)
    prune: PruneConfig = setting(
        lambda: PruneConfig(min_width=4, round_to=2),
        "whether and how to compress while training",
        choices=METHODS,
        unused=("eval_episodes", "gather_episodes"),
    )
    seed: int = setting(1, "of everything random")
    updates: int = setting(8_000, "length of the training")
    run_dir: str | None = setting(
        None, "folder of the run; null takes runs/autoencoder-<data>/<prune>/seed<seed>"
    )
    network: AutoencoderNetworkConfig = setting(AutoencoderNetworkConfig, "its widths")
    learning: AutoencoderLearningConfig = setting(AutoencoderLearningConfig, "its update")
    resume: str | None = setting(
        None, "folder of a run to go on with; only updates and threads may be changed"
    )
    start_from: str | None = setting(
        None, "checkpoint to start from, see scripts/prune.py; updates goes on from its count"
    )
    eval_every: int = setting(500, "updates between measurements, each saved as a checkpoint")
    threads: int = setting(1, "CPU threads")

    def __post_init__(self):
        for name in ("updates", "eval_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31)")
        check_machine("cpu", self.threads)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        if self.resume:
            return None  # what may be given beside it is checked there
        if "data.dir" in given and self.data.name == "digits":
            return Idle("data.dir", "with data=digits, which ship with scikit-learn", "data=mnist")
        return _not_pruned(self, given) or _not_gathered(self, given) or self.prune.idle(given)


@dataclass(frozen=True)
class PruneCheckpointConfig:
    """Pruning of a finished agent or autoencoder."""

    checkpoint: str = setting(MISSING, RUN_OR_CHECKPOINT, positional=True)
    prune: PruneConfig = setting(
        lambda: PruneConfig(method="bayesian", start=0.0), "how to compress", choices=RANKINGS
    )
    env_steps: int = setting(
        20_000, "an agent's training from here to the end, in simulator steps; 0 only cuts"
    )
    updates: int = setting(4_000, "an autoencoder's training from here to the end; 0 only cuts")
    seed: int = setting(1, "of everything random")
    run_dir: str | None = setting(
        None, "folder of the run; null takes runs/<task>/<prune>-of-finished/seed<seed>"
    )
    explain: str | None = setting(
        None, "file for the plan of one cut to prune.sparsity; it is printed, and nothing is cut"
    )
    eval_every: int | None = setting(
        None, "between evaluations; null takes 5 000 env steps, or 500 updates of an autoencoder"
    )
    eval_episodes: int = setting(10, "episodes per evaluation of an agent")
    device: str = setting("auto", "auto, cpu or cuda; auto takes CUDA where there is a GPU")
    threads: int = setting(1, "CPU threads")

    def __post_init__(self):
        require(self.env_steps >= 0, f"env_steps={self.env_steps} cannot be negative")
        require(self.updates >= 0, f"updates={self.updates} cannot be negative")
        require(self.prune.method != "none", "prune=none cuts nothing; choose what ranks the units")
        check_machine(self.device, self.threads)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        of_runs = ("env_steps", "updates", "run_dir", "eval_every", "eval_episodes")
        of_cuts = ("start", "end", "steps", "shape", "max_return_drop", "eval_episodes", "plan")
        if self.explain and (
            name := among(given, *of_runs, *(f"prune.{n}" for n in (*of_cuts, "compare")))
        ):
            return Idle(name, "with explain=…, which plans one cut and runs nothing")
        return self.prune.idle(given) or _clipped(self, self.eval_episodes, given)


@dataclass(frozen=True)
class GroupsConfig:
    """A look at an agent's groups."""

    checkpoint: str | None = setting(
        None, f"{RUN_OR_CHECKPOINT}; null takes a dense agent for `task`", positional=True
    )
    task: str = setting("cartpole-swingup", "whose observations and actions a dense agent gets")
    model: AgentConfig = setting(
        AgentConfig, "the dense agent", choices=MODELS, unused=_NOT_COUNTED
    )
    json: str | None = setting(None, "file to write the groups to")

    def __post_init__(self):
        object.__setattr__(self, "task", task_name(self.task))

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        name = among(given, "task", "model", "model.")
        return Idle(name, "with checkpoint=…") if name and self.checkpoint else None


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation of a saved agent."""

    checkpoint: str = setting(MISSING, RUN_OR_CHECKPOINT, positional=True)
    task: str | None = setting(None, "the task it must be for; null takes whatever it is for")
    episodes: int = setting(10, "episodes to play")
    seed: int = setting(0, "of the episodes' initial states and of the planner")
    viewer: bool = setting(False, "play in MuJoCo's viewer, in real time, until it is closed")
    video: str | None = setting(None, "MP4 file to film the episodes in, one after another")
    parent: str | None = setting(
        None, "dense agent to compare with; null takes the one that the checkpoint names"
    )
    play_parent: bool = setting(
        False, "play the dense agent's episodes, too, instead of quoting its return on file"
    )
    save: str | None = setting(
        None, "folder to save the agent in, with a card of this evaluation, ready to be shipped"
    )
    device: str = setting("auto", "auto, cpu or cuda; auto takes CUDA where there is a GPU")
    threads: int = setting(1, "CPU threads")

    def __post_init__(self):
        if self.task is not None:
            object.__setattr__(self, "task", task_name(self.task))
        require(self.episodes >= 1, f"episodes={self.episodes} must be at least 1")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31)")
        require(
            not (self.viewer and (self.video or self.save)),
            "viewer=true plays until the window is closed; give video= or save= without it",
        )
        check_machine(self.device, self.threads)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        name = among(given, "episodes", "parent", "play_parent")
        if name and self.viewer:
            return Idle(name, "with viewer=true, which plays until the window is closed")
        return None


@dataclass(frozen=True)
class FitConfig:
    """A search for the best agent that decides fast enough on this machine."""

    checkpoint: str = setting(
        MISSING,
        f"{RUN_OR_CHECKPOINT}; of a pruning run all agents are candidates",
        positional=True,
    )
    rate_hz: float = setting(100.0, "decisions per second that it must reach")
    max_return_drop: float = setting(
        0.05, "fraction of the dense agent's return that may be lost at most"
    )
    parent: str | None = setting(
        None, "dense agent to compare with; null takes the one that the checkpoint names"
    )
    episodes: int = setting(20, "episodes that the best candidates are judged by")
    seed: int = setting(0, "of the episodes' initial states and of the planner")
    env_steps: int | None = setting(
        None,
        "training while the networks are cut, in simulator steps; 0 takes them as they are; "
        "null takes 20 000 for a dense agent, and 0 for a pruned one or a pruning run",
    )
    prune: PruneConfig = setting(
        lambda: PruneConfig(method="bayesian", start=0.0, sparsity=0.97, max_return_drop=0.3),
        "how the networks are cut first; its max_return_drop undoes cuts, the one above judges "
        "what is found",
        choices=RANKINGS,
    )
    out: str | None = setting(
        None, "folder for the fitted agent; null takes runs/<task>/fitted-<rate>hz"
    )
    threads: int = setting(1, "CPU threads that it will run with")

    def __post_init__(self):
        require(self.rate_hz > 0, f"rate_hz={self.rate_hz} must be positive")
        require(
            0 <= self.max_return_drop < 1,
            f"max_return_drop={self.max_return_drop} must lie in [0, 1)",
        )
        require(self.episodes >= 1, f"episodes={self.episodes} must be at least 1")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31)")
        require(
            self.env_steps is None or self.env_steps >= 0,
            f"env_steps={self.env_steps} cannot be negative",
        )
        check_machine("cpu", self.threads)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        if self.env_steps == 0:
            return self.idle_uncut(given)
        return self.prune.idle(given) or _clipped(self, PruneCheckpointConfig.eval_episodes, given)

    def idle_uncut(self, given: Sequence[str]) -> Idle | None:
        """The same, where the networks are taken as they are."""
        name = among(given, "prune", "prune.")
        if name is None:
            return None
        return Idle(name, "where nothing is cut, as with a pruned agent", "env_steps=20000")


COEFFICIENT_METHODS = ("gradient", "grid", "global", "uniform")


@dataclass(frozen=True)
class CoefficientsConfig:
    """A search for how much to take from each group."""

    checkpoint: str = setting(
        MISSING, f"{RUN_OR_CHECKPOINT}, of an agent or an autoencoder", positional=True
    )
    method: str = setting(
        "gradient",
        "gradient, or grid: search for the coefficients; or, to compare, global or uniform",
    )
    sparsity: float = setting(0.8, "fraction of its parameters that is to go")
    tolerance: float = setting(0.01, "by which the sparsity may be exceeded")
    largest: float = setting(0.8, "coefficient that a group may have (c_max)")
    budget: int = setting(100, "grid: most evaluations of the score")
    steps: int = setting(400, "gradient: steps of the descent, each on the loss of one batch")
    fine_tuning: int = setting(500, "after the cut: updates, or an agent's env steps")
    episodes: int = setting(5, "of an agent: per measurement of its return")
    prune: PruneConfig = setting(
        lambda: PruneConfig(method="bayesian", min_width=2),
        "how units are ranked, and floors",
        choices=RANKINGS,
        unused=(*_OF_CUTS, "compare"),
    )
    seed: int = setting(1, "of the batches")
    threads: int = setting(1, "CPU threads")
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

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        for name, method in (("budget", "grid"), ("steps", "gradient")):
            if name in given and self.method != method:
                return Idle(name, f"with method={self.method}", f"method={method}")
        return None


@dataclass(frozen=True)
class CompareCoefficientsConfig:
    """A comparison of ways to choose how much to take from each group, at equal sparsity."""

    checkpoint: list[str] = setting(
        MISSING,
        "folders of runs, or checkpoints, such as one for each seed: [a, b]",
        positional=True,
        formerly="checkpoints",
    )
    sparsities: list[float] = setting(lambda: [0.5, 0.8, 0.9], "at which to compare")
    tolerance: float = setting(0.01, "by which a sparsity may be exceeded")
    largest: float = setting(0.8, "coefficient that a group may have (c_max)")
    budget: int = setting(100, "grid: most evaluations of the score")
    steps: int = setting(400, "gradient: steps of the descent, each on the loss of one batch")
    fine_tuning: int = setting(500, "after the cut: updates, or an agent's env steps")
    episodes: int = setting(5, "of an agent: per measurement of its return")
    prune: PruneConfig = setting(
        lambda: PruneConfig(method="bayesian", min_width=2),
        "floors; every arm has its own ranking",
        unused=("method", *_OF_CUTS, "compare"),
    )
    seed: int = setting(1, "of the batches")
    threads: int = setting(1, "CPU threads")
    out: str = setting("coefficients", "of the files <out>.md and <out>.csv")

    def __post_init__(self):
        require(self.checkpoint != [], "checkpoint=[] names none")
        require(self.sparsities != [], "sparsities=[] names none")
        for sparsity in self.sparsities:  # refuses what one search would refuse
            CoefficientsConfig(
                checkpoint="",
                sparsity=sparsity,
                tolerance=self.tolerance,
                largest=self.largest,
                budget=self.budget,
                steps=self.steps,
                fine_tuning=self.fine_tuning,
                episodes=self.episodes,
                prune=self.prune,
                threads=self.threads,
            )


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
        choices=RANKINGS,
        unused=(*_OF_CUTS, *_FLOORS),
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
class ExportConfig:
    """An export of a saved agent."""

    checkpoint: str = setting(MISSING, RUN_OR_CHECKPOINT, positional=True)
    format: str = setting("onnx", "onnx")
    part: str = setting("planner", "planner (the whole decision), or policy (without planning)")
    out: str | None = setting(
        None, "file to write, *.onnx; its description goes beside it; null takes <task>-<part>.onnx"
    )

    def __post_init__(self):
        require(self.format == "onnx", f"format={self.format} is not known; the only one is onnx")
        require(self.part in ("planner", "policy"), f"part={self.part} must be planner or policy")


@dataclass(frozen=True)
class BenchmarkConfig:
    """A measurement of how long a decision and an update take."""

    checkpoint: str | None = setting(
        None,
        f"{RUN_OR_CHECKPOINT}, to measure beside its dense parent with the published planner "
        "budget; null measures a new agent's decisions and updates",
        positional=True,
    )
    task: str = setting("cartpole-swingup", "the task whose observations and actions to use")
    model: AgentConfig = setting(AgentConfig, "the new agent", choices=MODELS)
    episodes: int = setting(
        20, "episodes that both of them play; 0 quotes the parent's return on file"
    )
    seed: int = setting(0, "of those episodes")
    environments: int = setting(1, "decisions planned at once")
    repeats: int = setting(30, "timed calls; the median is reported")
    device: str = setting("auto", "auto, cpu or cuda; auto takes CUDA where there is a GPU")
    threads: int = setting(1, "CPU threads")
    json: str | None = setting(None, "file to write the measurements to")

    def __post_init__(self):
        object.__setattr__(self, "task", task_name(self.task))
        for name in ("environments", "repeats"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        require(self.episodes >= 0, f"episodes={self.episodes} cannot be negative")
        check_machine(self.device, self.threads)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        if self.checkpoint:
            name = among(given, "environments", "model", "model.")
            return Idle(name, "with checkpoint=…, which brings its own") if name else None
        name = among(given, "episodes", "seed")
        return Idle(name, "without checkpoint=…, whose episodes are played") if name else None


def check_machine(device: str, threads: int) -> None:
    """Refuse a device or thread count that cannot be."""
    require(device in ("auto", "cpu", "cuda"), f"device={device} must be auto, cpu or cuda")
    require(threads >= 1, f"threads={threads} must be at least 1")


DENSE, SMALL, REINITIALISED = "dense", "small from scratch", "re-initialised"
COEFFICIENTS = "coefficients"
ARMS = (DENSE, SMALL, REINITIALISED, *METRICS, COEFFICIENTS)


@dataclass(frozen=True)
class StudyConfig:
    """A comparison of ways to prune: tasks × arms × sparsities × seeds."""

    tasks: list[str] = setting(
        lambda: ["cartpole-swingup", "walker-walk", "cheetah-run", "reacher-easy"], "the tasks"
    )
    arms: list[str] = setting(lambda: list(ARMS), f"of {', '.join(ARMS)}")
    sparsities: list[float] = setting(
        lambda: [0.5, 0.8, 0.9, 0.95, 0.99], "fractions of the parameters that go, in one cut"
    )
    seeds: list[int] = setting(lambda: [1, 2, 3, 4, 5], "each with a dense agent of its own")
    start_env_steps: int = setting(25_000, "training of the dense agents before the cut")
    env_steps: int = setting(6_000, "training after it; small ones from scratch get both")
    eval_every: int = setting(1_000, "env steps between evaluations after the cut")
    episodes: int = setting(5, "per evaluation")
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
        for name in ("start_env_steps", "env_steps", "eval_every", "episodes", "min_width"):
            value = getattr(self, name)
            require(value >= 1, f"study.{name}={value} must be at least 1")


STUDIES = {
    "full": StudyConfig(),
    "quick": StudyConfig(
        tasks=["cartpole-balance"],
        arms=[DENSE, SMALL, REINITIALISED, "random", "magnitude", "bayesian"],
        sparsities=[0.5, 0.9],
        seeds=[1, 2],
        start_env_steps=10_000,
        env_steps=3_000,
        episodes=3,
        model=AgentConfig(
            network=AgentNetworkConfig(encoder_width=48, latent_width=16, hidden_width=48),
            planner=PlannerConfig(samples=64, elites=16, iterations=4, schedule_decisions=1_000),
            learning=AgentLearningConfig(seed_decisions=250, batch=128),
        ),
        out="studies/quick",
    ),
}


@dataclass(frozen=True)
class StudyCommand:
    """The whole study, or one of its jobs, or the report of one that was run."""

    study: StudyConfig = setting(
        StudyConfig,
        "what is compared",
        choices={
            "full": "four tasks, every arm, five sparsities, five seeds",
            "quick": "one task, six arms, two sparsities, two seeds, small networks",
        },
    )
    job: int | None = setting(None, "number of the one job to run; null runs all, and reports")
    report: str | None = setting(
        None,
        "results.csv of a study: nothing is run, its tables and pictures are made again beside it",
    )

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        name = among(given, "study", "study.", "job")
        return Idle(name, "with report=…, which runs nothing") if name and self.report else None


COMMANDS = {
    "train": TrainConfig,
    "train_autoencoder": AutoencoderConfig,
    "prune": PruneCheckpointConfig,
    "groups": GroupsConfig,
    "evaluate": EvaluateConfig,
    "fit": FitConfig,
    "optimize_coefficients": CoefficientsConfig,
    "compare_coefficients": CompareCoefficientsConfig,
    "sensitivity": SensitivityConfig,
    "stability": StabilityConfig,
    "importance": ImportanceConfig,
    "study": StudyCommand,
    "export": ExportConfig,
    "benchmark": BenchmarkConfig,
}
GROUPS = {
    "model": PRESETS,
    "study": STUDIES,
    "data": {name: DataConfig(name) for name in DATA},
    "prune": {method: PruneConfig(method=method) for method in ("none", *METRICS)},
}


def register() -> None:
    """Tell Hydra of the commands' settings and of the choices for `model=` and `prune=`."""
    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_settings", node=_overridable(schema))
    for group, choices in GROUPS.items():
        for name, choice in choices.items():
            store.store(group=group, name=name, node=_overridable(choice))


def _overridable(config: Any) -> DictConfig:
    """OmegaConf makes frozen dataclasses read-only; a command line has to override them."""
    node = OmegaConf.structured(config)

    def thaw(part: DictConfig) -> None:
        OmegaConf.set_readonly(part, False)
        if not dataclasses.is_dataclass(OmegaConf.get_type(part)):
            OmegaConf.set_struct(part, False)  # a plain dict takes any key
        for key in part:
            if OmegaConf.is_dict(part._get_node(key)):
                thaw(part[key])

    thaw(node)
    return node


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of JSON types."""
    return dataclasses.asdict(config)


def by_dotted_name(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: `{"model.planner.samples": 256, …}`."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        nested = isinstance(value, dict) and value
        flat |= by_dotted_name(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def from_plain(schema: type, values: dict[str, Any]) -> Any:
    """The configuration that `to_plain` wrote.

    Raises:
        UserError: a setting is unknown here or of the wrong type, and which.
    """
    try:
        merged = OmegaConf.merge(_overridable(schema), OmegaConf.create(values))
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{schema.__name__}: {str(error).splitlines()[0]}") from error
