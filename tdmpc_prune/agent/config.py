"""Everything about the agent that can be set, and its two presets.

Every field says what it is, in which unit, where it is declared; `train.py --help` prints the same
text. The `paper` preset is the published agent (Hansen, Wang, Su 2022, and its public code).
"""

from __future__ import annotations

from dataclasses import dataclass

from tdmpc_prune.settings import Choice, require, setting

_LEAST_RATE = 0.05  # of the learning rate, at the end of a run


@dataclass(frozen=True)
class NetworkConfig:
    """Widths of the dense agent's networks."""

    encoder_width: int = setting(128, "hidden units of the encoder")
    latent_width: int = setting(32, "dimension of the latent state")
    hidden_width: int = setting(128, "hidden units of dynamics, reward, policy and every Q")
    q_members: int = setting(2, "members of the Q ensemble; their minimum is the value")

    def __post_init__(self):
        for name in ("encoder_width", "latent_width", "hidden_width", "q_members"):
            value = getattr(self, name)
            require(value >= 1, f"model.network.{name}={value} must be at least 1")


@dataclass(frozen=True)
class PlannerConfig:
    """MPPI: what a decision costs and how it searches."""

    horizon: int = setting(3, "latent steps that a plan looks ahead, in decisions")
    iterations: int = setting(6, "times that the sampling distribution is refitted per decision")
    samples: int = setting(256, "Gaussian action sequences per iteration")
    policy_fraction: float = setting(0.05, "policy trajectories, as a fraction of `samples`")
    elites: int = setting(32, "best sequences that the distribution is refitted to")
    temperature: float = setting(0.5, "how strongly an elite's score follows its value")
    momentum: float = setting(0.1, "share of the old mean that each refit keeps")
    min_std: float = setting(0.05, "smallest std of the sampling distribution, after its schedule")
    max_std: float = setting(2.0, "initial and largest std of the sampling distribution")
    start_std: float = setting(0.5, "smallest std at the start of training")
    start_horizon: int | None = setting(
        None, "horizon at the start of training, in decisions; null takes `horizon`"
    )
    schedule_decisions: int = setting(
        4_000,
        "decisions over which the smallest std and the horizon move to their final values, counted "
        "from when rewards are met",
    )
    policy_noise: float = setting(0.05, "std of the noise on policy actions inside the model")
    policy_noise_clip: float = setting(0.3, "that noise is cut off here")

    def __post_init__(self):
        for name in ("horizon", "iterations", "samples", "elites", "start_horizon"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.planner.{name}={value} must be at least 1")
        require(
            self.elites <= self.samples,
            f"model.planner.elites={self.elites} cannot exceed "
            f"model.planner.samples={self.samples}",
        )
        require(
            self.start_horizon is None or self.start_horizon <= self.horizon,
            f"model.planner.start_horizon={self.start_horizon} cannot exceed "
            f"model.planner.horizon={self.horizon}",
        )
        require(
            0 <= self.policy_fraction <= 1,
            f"model.planner.policy_fraction={self.policy_fraction} must lie in [0, 1]",
        )
        require(
            0 <= self.momentum < 1,
            f"model.planner.momentum={self.momentum} must lie in [0, 1)",
        )
        require(
            0 < self.min_std <= self.max_std and 0 < self.start_std <= self.max_std,
            f"model.planner: min_std={self.min_std} and start_std={self.start_std} must be "
            f"positive and at most max_std={self.max_std}",
        )
        for name in ("temperature", "policy_noise", "policy_noise_clip", "schedule_decisions"):
            value = getattr(self, name)
            require(value >= 0, f"model.planner.{name}={value} cannot be negative")

    @property
    def policy_samples(self) -> int:
        """Policy trajectories per decision."""
        return int(self.policy_fraction * self.samples)

    def horizon_at(self, decisions: int) -> int:
        """The horizon after so many decisions of training (linear schedule)."""
        return int(self._scheduled(self.start_horizon or self.horizon, self.horizon, decisions))

    def min_std_at(self, decisions: int) -> float:
        """The smallest std after so many decisions of training (linear schedule)."""
        return self._scheduled(self.start_std, self.min_std, decisions)

    def _scheduled(self, start: float, end: float, decisions: int) -> float:
        done = min(1.0, decisions / self.schedule_decisions) if self.schedule_decisions else 1.0
        return (1 - done) * start + done * end


@dataclass(frozen=True)
class LearningConfig:
    """The replay buffer and the update."""

    seed_decisions: int = setting(1_000, "random decisions before the agent learns or plans")
    updates_per_decision: float = setting(4.0, "gradient updates per decision of an episode")
    batch: int = setting(64, "sequences per update")
    horizon: int = setting(3, "latent steps that an update unrolls, in decisions")
    learning_rate: float = setting(1e-3, "of both Adam optimisers")
    cooldown: float = setting(
        0.2,
        "last share of a run over which the learning rate falls, to a twentieth; 0 is none; a "
        "run that is resumed for longer goes back up",
        before=0.0,
    )
    gradient_clip: float = setting(10.0, "largest norm of a gradient")
    discount: float = setting(0.99, "per decision")
    rho: float = setting(0.5, "weight of latent step t in the losses is rho^t")
    consistency_weight: float = setting(2.0, "of the latent consistency loss")
    reward_weight: float = setting(0.5, "of the reward loss")
    value_weight: float = setting(0.1, "of the TD loss")
    target_rate: float = setting(0.01, "step of the target network towards the online one")
    target_every: int = setting(1, "updates between two such steps")
    averaged_updates: int = setting(
        2_500,
        "updates over which the weights are averaged that are evaluated, cut and saved, at most "
        "the last quarter of all; 0 takes the last weights",
        before=0,
    )
    priority_exponent: float = setting(0.6, "alpha of prioritised replay; 0 samples uniformly")
    priority_correction: float = setting(0.4, "beta of prioritised replay")
    buffer_decisions: int = setting(1_000_000, "decisions that the replay buffer holds")
    exploration: str = setting(
        "pink",
        "noise on executed actions: pink (slow and fast); or white, after uniform first actions",
        before="white",
    )
    scale_observations: bool = setting(
        True,
        "learn as if observations that vary little in the random decisions were enlarged, and huge "
        "ones shrunk",
        before=False,
    )
    curiosity: float = setting(
        0.3, "reward for what was rarely seen, until rewards are met; 0 is none", before=0.0
    )

    def __post_init__(self):
        for name in ("batch", "horizon", "target_every", "buffer_decisions"):
            value = getattr(self, name)
            require(value >= 1, f"model.learning.{name}={value} must be at least 1")
        require(
            self.buffer_decisions > self.horizon,
            f"model.learning.buffer_decisions={self.buffer_decisions} must exceed "
            f"model.learning.horizon={self.horizon}",
        )
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            require(value > 0, f"model.learning.{name}={value} must be positive")
        for name in (
            *("cooldown", "discount", "rho", "target_rate"),
            *("priority_exponent", "priority_correction"),
        ):
            value = getattr(self, name)
            require(0 <= value <= 1, f"model.learning.{name}={value} must lie in [0, 1]")
        for name in ("seed_decisions", "updates_per_decision", "averaged_updates", "curiosity"):
            value = getattr(self, name)
            require(value >= 0, f"model.learning.{name}={value} cannot be negative")
        require(
            self.exploration in ("pink", "white"),
            f"model.learning.exploration={self.exploration} must be pink or white",
        )

    def rate_at(self, done: float) -> float:
        """The learning rate once a share `done` of a run is over (linear schedule)."""
        left = (1 - done) / self.cooldown if self.cooldown else 1.0
        return self.learning_rate * min(1.0, max(_LEAST_RATE, left))


@dataclass(frozen=True)
class AgentConfig:
    """One agent: its networks, its planner and how it learns."""

    network: NetworkConfig = setting(NetworkConfig, "widths of the networks")
    planner: PlannerConfig = setting(PlannerConfig, "MPPI")
    learning: LearningConfig = setting(LearningConfig, "replay buffer and update")


PRESETS = {
    "default": Choice(AgentConfig(), "128 wide, 256 samples: for one CPU core"),
    "paper": Choice(
        AgentConfig(
            NetworkConfig(encoder_width=256, latent_width=50, hidden_width=512, q_members=2),
            PlannerConfig(
                horizon=5, start_horizon=1, samples=512, elites=64, schedule_decisions=25_000
            ),
            LearningConfig(
                seed_decisions=5_000,
                updates_per_decision=1.0,
                batch=512,
                horizon=5,
                cooldown=0.0,
                target_every=2,
                averaged_updates=0,
                exploration="white",
                scale_observations=False,
                curiosity=0.0,
            ),
        ),
        "as published, 512 wide and 512 samples",
    ),
}
