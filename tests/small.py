"""A run that takes seconds, for tests of what surrounds the learning."""

from dataclasses import replace

from tdmpc_prune.agent.config import AgentConfig, LearningConfig, NetworkConfig, PlannerConfig
from tdmpc_prune.pruning.config import PruneConfig
from tdmpc_prune.training.config import TrainConfig

AGENT = AgentConfig(
    network=NetworkConfig(encoder_width=12, latent_width=6, hidden_width=16),
    planner=PlannerConfig(horizon=3, iterations=2, samples=24, elites=6, schedule_decisions=60),
    learning=LearningConfig(
        seed_decisions=40, updates_per_decision=1.0, batch=16, buffer_decisions=110
    ),
)


def small_config(run_dir, **changes) -> TrainConfig:
    """200 env steps of `Reach` with tiny networks, in a buffer that wraps."""
    config = TrainConfig(
        task="gym:tests.synthetic:Reach-v0",
        model=AGENT,
        env_steps=200,
        eval_every=60,
        eval_episodes=2,
        device="cpu",
        run_dir=str(run_dir),
    )
    return replace(config, **changes)


PRUNE = PruneConfig(
    method="bayesian",
    refit=False,  # test_refitted_runs.py has it; it takes as long as all else
    sparsity=0.7,
    start=0.2,
    end=0.8,
    steps=3,
    min_width=2,
    round_to=1,
    max_return_drop=10.0,  # the tiny agent learns nothing: every step is kept
    gather_updates=5,
    gather_episodes=2,
)


def pruning_config(run_dir, **changes) -> TrainConfig:
    """The same run, pruned in three steps."""
    return small_config(run_dir, prune=PRUNE, **changes)
