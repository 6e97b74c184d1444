"""Everything that can be set about a run: training an agent or an autoencoder, pruning either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from tdmpc_prune.agent.config import PRESETS, AgentConfig
from tdmpc_prune.autoencoder.config import IMAGES, DataConfig
from tdmpc_prune.autoencoder.config import LearningConfig as AutoencoderLearningConfig
from tdmpc_prune.autoencoder.config import NetworkConfig as AutoencoderNetworkConfig
from tdmpc_prune.envs import task_name
from tdmpc_prune.pruning.config import METHODS, ONE_CUT, RANKINGS, PruneConfig
from tdmpc_prune.settings import (
    DECISIONS,
    RUN_OR_CHECKPOINT,
    Idle,
    among,
    check_machine,
    require,
    setting,
)
from tdmpc_prune.words import folder_name


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


def _together(config: Any, given: Sequence[str]) -> Idle | None:
    """Only the planner in C plays the episodes of an evaluation one after another."""
    if "eval_least" in given and config.decisions == "torch":
        return Idle("eval_least", "with decisions=torch, which plays all episodes together")
    return None


EVAL_LEAST = (
    "episodes after which an evaluation by the planner in C may end: once the standard error of "
    "the mean is below 1 %, or nothing has been learnt yet; the last is whole; eval_episodes plays "
    "all"
)


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    MAY_CHANGE_ON_RESUME: ClassVar = ("device", "env_steps", "threads")

    task: str = setting(
        "cartpole-swingup", "a DeepMind Control Suite task, gym:<id> or file:<path>:<class>"
    )
    prune: PruneConfig = setting(
        PruneConfig, "whether and how to compress while training", choices=METHODS
    )
    seed: int = setting(1, "of everything random")
    env_steps: int = setting(50_000, "length of the training, in simulator steps")
    run_dir: str | None = setting(
        None, "folder of the run; null takes runs/<task>/<prune>/seed<seed>"
    )
    model: AgentConfig = setting(AgentConfig, "the agent", choices=PRESETS)
    resume: str | None = setting(
        None, "folder of a run to go on with; only env_steps, device and threads may be changed"
    )
    start_from: str | None = setting(
        None, "checkpoint to start from, see scripts/prune.py; env_steps goes on from its count"
    )
    eval_every: int = setting(5_000, "env steps between evaluations, each saved as a checkpoint")
    eval_episodes: int = setting(10, "episodes per evaluation")
    eval_least: int = setting(3, EVAL_LEAST)
    action_repeat: int | None = setting(
        None, "simulator steps per decision; null takes the task's own"
    )
    device: str = setting("auto", "auto, cpu or cuda; auto takes CUDA where there is a GPU")
    threads: int = setting(1, "CPU threads; more only helps while other processes leave cores idle")
    decisions: str = setting("auto", DECISIONS)

    def __post_init__(self):
        object.__setattr__(self, "task", task_name(self.task))  # one task, one name
        for name in ("env_steps", "eval_every", "eval_episodes", "eval_least"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31)")
        check_machine(self.device, self.threads, self.decisions)

    @property
    def subject(self) -> str:
        """What is learnt, as the name of a folder."""
        return folder_name(self.task)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        if self.resume:
            return None  # what may be given beside it is checked there
        return (
            _not_pruned(self, given)
            or _not_gathered(self, given)
            or self.prune.idle(given)
            or self.prune.clipped(given, self.eval_episodes)
            or _together(self, given)
        )


@dataclass(frozen=True)
class AutoencoderConfig:
    """A training run of an autoencoder."""

    MAY_CHANGE_ON_RESUME: ClassVar = ("threads", "updates")

    data: DataConfig = setting(DataConfig, "the images", choices=IMAGES)
    prune: PruneConfig = setting(
        lambda: PruneConfig(min_width=4, round_to=2),
        "whether and how to compress while training",
        choices=METHODS,
        unused=("distil", "eval_episodes", "gather_episodes"),
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

    @property
    def subject(self) -> str:
        """What is learnt, as the name of a folder."""
        return f"autoencoder-{self.data.name}"

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
    prune: PruneConfig = setting(ONE_CUT, "how to compress", choices=RANKINGS)
    env_steps: int = setting(
        0, "an agent's training from here to the end, in simulator steps; 0 only cuts"
    )
    updates: int = setting(0, "an autoencoder's training from here to the end; 0 only cuts")
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
    eval_least: int = setting(3, EVAL_LEAST)
    device: str = setting("auto", "auto, cpu or cuda; auto takes CUDA where there is a GPU")
    threads: int = setting(1, "CPU threads")
    decisions: str = setting("auto", DECISIONS)

    def __post_init__(self):
        require(self.env_steps >= 0, f"env_steps={self.env_steps} cannot be negative")
        require(self.updates >= 0, f"updates={self.updates} cannot be negative")
        require(self.prune.method != "none", "prune=none cuts nothing; choose what ranks the units")
        check_machine(self.device, self.threads, self.decisions)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        of_runs = ("env_steps", "updates", "run_dir")
        of_runs += ("eval_every", "eval_episodes", "eval_least")
        of_cuts = ("start", "end", "steps", "shape", "max_return_drop", "eval_episodes", "plan")
        if self.explain and (
            name := among(given, *of_runs, *(f"prune.{n}" for n in (*of_cuts, "compare")))
        ):
            return Idle(name, "with explain=…, which plans one cut and runs nothing")
        return (
            self.prune.idle(given)
            or self.prune.clipped(given, self.eval_episodes)
            or _together(self, given)
        )


@dataclass(frozen=True)
class DistilConfig:
    """Teaching of a small student."""

    checkpoint: str = setting(MISSING, f"the teacher: {RUN_OR_CHECKPOINT}", positional=True)
    sparsity: float = setting(0.9, "the student is evenly narrower: parameters that it lacks")
    encoder_width: int | None = setting(
        None, "or: its encoder's hidden width; null is the teacher's, the same below"
    )
    latent_width: int | None = setting(None, "its latent's")
    hidden_width: int | None = setting(None, "its other hidden widths")
    steps: int = setting(8_000, "offline training steps")
    gather_episodes: int = setting(
        10, "episodes played first if the teacher comes without a replay buffer"
    )
    eval_episodes: int = setting(10, "episodes per evaluation")
    save: str | None = setting(
        None, "folder of the student; null takes runs/<task>/student/seed<seed>"
    )
    seed: int = setting(1, "of the student's weights and everything else random")
    device: str = setting("auto", "auto, cpu or cuda; auto takes CUDA where there is a GPU")
    threads: int = setting(1, "CPU threads")

    def __post_init__(self):
        require(0 < self.sparsity < 1, f"sparsity={self.sparsity} must lie in (0, 1)")
        for name in ("steps", "gather_episodes", "eval_episodes"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        for name in _WIDTHS:
            value = getattr(self, name)
            require(value is None or value >= 2, f"{name}={value} must be at least 2")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31)")
        check_machine(self.device, self.threads)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        if "sparsity" in given and (name := among(given, *_WIDTHS)):
            return Idle("sparsity", f"with {name}=…")
        return None


_WIDTHS = ("encoder_width", "latent_width", "hidden_width")
