"""Everything that can be set about playing, fitting, exporting and timing an agent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omegaconf import MISSING

from tdmpc_prune.agent.config import PRESETS, AgentConfig
from tdmpc_prune.envs import task_name
from tdmpc_prune.pruning.config import RANKINGS, PruneConfig
from tdmpc_prune.settings import (
    DECISIONS,
    RUN_OR_CHECKPOINT,
    Idle,
    among,
    check_machine,
    require,
    setting,
)
from tdmpc_prune.training.config import PruneCheckpointConfig
from tdmpc_prune.words import folder_name


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
    decisions: str = setting("auto", DECISIONS)

    def __post_init__(self):
        if self.task is not None:
            object.__setattr__(self, "task", task_name(self.task))
        require(self.episodes >= 1, f"episodes={self.episodes} must be at least 1")
        require(0 <= self.seed < 2**31, f"seed={self.seed} must lie in [0, 2^31)")
        require(
            not (self.viewer and (self.video or self.save)),
            "viewer=true plays until the window is closed; give video= or save= without it",
        )
        check_machine(self.device, self.threads, self.decisions)

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
    rate_hz: float = setting(100.0, "decisions per second that 95 % of them must keep, by CPU time")
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
        replace(
            RANKINGS["compensated"].value, start=0.0, steps=8, sparsity=0.97, max_return_drop=0.3
        ),
        "how the networks are cut first; its max_return_drop undoes cuts, the one above judges "
        "what is found",
        choices=RANKINGS,
    )
    out: str | None = setting(
        None, "folder for the fitted agent; null takes runs/<task>/fitted-<rate>hz"
    )
    threads: int = setting(1, "CPU threads that it will run with")
    decisions: str = setting("auto", DECISIONS)

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
        check_machine("cpu", self.threads, self.decisions)

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        if self.env_steps == 0:
            return self.idle_uncut(given)
        return self.prune.idle(given) or self.prune.clipped(
            given, PruneCheckpointConfig.eval_episodes
        )

    def idle_uncut(self, given: Sequence[str]) -> Idle | None:
        """The same, where the networks are taken as they are."""
        name = among(given, "prune", "prune.")
        if name is None:
            return None
        return Idle(name, "where nothing is cut, as with a pruned agent", "env_steps=20000")


@dataclass(frozen=True)
class ExportConfig:
    """An export of a saved agent."""

    checkpoint: str = setting(MISSING, RUN_OR_CHECKPOINT, positional=True)
    format: str = setting("onnx", "onnx (one graph), or c (a folder that compiles as it is)")
    part: str = setting("planner", "planner (the whole decision), or policy (without planning)")
    out: str | None = setting(
        None,
        "file to write, *.onnx, its description goes beside it; or folder to write in C; null "
        "takes <task>-<part>.onnx, or <task>-<part>-c",
    )
    weights: str = setting(
        "float32", "how C stores matrices: float32, float16 or int8; it computes in float32"
    )
    flash_kb: float | None = setting(
        None, "flash memory that the C program must fit into, in units of 1 000 bytes"
    )

    def __post_init__(self):
        require(
            self.format in ("onnx", "c"),
            f"format={self.format} is not known; it must be onnx or c",
        )
        require(self.part in ("planner", "policy"), f"part={self.part} must be planner or policy")
        require(
            self.weights in ("float32", "float16", "int8"),
            f"weights={self.weights} must be float32, float16 or int8",
        )
        require(
            self.flash_kb is None or self.flash_kb > 0,
            f"flash_kb={self.flash_kb} must be positive",
        )

    def idle(self, given: Sequence[str]) -> Idle | None:
        """A given setting without effect."""
        name = among(given, "weights", "flash_kb")
        if name and self.format != "c":
            return Idle(name, "without format=c", "format=c")
        return None


@dataclass(frozen=True)
class ImportConfig:
    """An import of a checkpoint of the public TD-MPC code."""

    file: str = setting(MISSING, "the file that its torch.save wrote, *.pt", positional=True)
    task: str = setting(MISSING, "the task that it learnt, which the file does not say")
    action_repeat: int | None = setting(
        None, "simulator steps per decision; null takes the task's published one"
    )
    env_steps: int | None = setting(
        None, "simulator steps that it learnt for; null: as long as exploration is scheduled"
    )
    seed: int = setting(0, "that it learnt with, for the record")
    model: AgentConfig = setting(
        lambda: PRESETS["paper"].value,
        "what the file does not say, as published",
        unused=("network",),
    )
    out: str | None = setting(None, "folder for the agent; null takes runs/<task>/imported")

    def __post_init__(self):
        if self.task != MISSING:
            object.__setattr__(self, "task", task_name(self.task))
        require(
            self.action_repeat is None or self.action_repeat >= 1,
            f"action_repeat={self.action_repeat} must be at least 1",
        )
        require(
            self.env_steps is None or self.env_steps >= 0,
            f"env_steps={self.env_steps} cannot be negative",
        )

    @property
    def subject(self) -> str:
        """The task, as the name of a folder."""
        return folder_name(self.task)


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
    model: AgentConfig = setting(AgentConfig, "the new agent", choices=PRESETS)
    episodes: int = setting(
        20, "episodes that both of them play; 0 quotes the parent's return on file"
    )
    seed: int = setting(0, "of those episodes")
    environments: int = setting(1, "decisions planned at once")
    repeats: int = setting(30, "timed calls; the median is reported")
    device: str = setting("auto", "auto, cpu or cuda; auto takes CUDA where there is a GPU")
    threads: int = setting(1, "CPU threads")
    json: str | None = setting(None, "file to write the measurements to")
    picture: str | None = setting(None, "PNG file to draw every way to decide in")
    page: str | None = setting(
        None, "page of measured machines (Markdown) to add a line of this measurement to"
    )

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
        name = among(given, "episodes", "seed", "picture", "page")
        return Idle(name, "without checkpoint=…, whose episodes are played") if name else None
