"""The planner: the same decisions as the plain one, batching, and what it finds."""

from dataclasses import replace

import pytest
import torch

from tdmpc_prune.agent.config import NetworkConfig, PlannerConfig
from tdmpc_prune.agent.planner import (
    Decision,
    PlannerNoise,
    draw_noise,
    first_means,
    margins,
    plan,
    planning_macs,
)
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tests.reference import plan_one

CONFIG = PlannerConfig(horizon=4, iterations=3, samples=64, elites=8)


def make_model(seed=0, action=2):
    generator = torch.Generator().manual_seed(seed)
    network = NetworkConfig(encoder_width=16, latent_width=8, hidden_width=24)
    model = WorldModel(Widths.dense(network, 5, action), generator)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def pick(noise, environment):
    """The noise of one of several environments, as a batch of one."""
    return PlannerNoise(
        samples=noise.samples[:, :, environment : environment + 1],
        sample_ends=noise.sample_ends[:, environment : environment + 1],
        policy=noise.policy[:, environment : environment + 1],
        policy_ends=noise.policy_ends[environment : environment + 1],
        choice=noise.choice[environment : environment + 1],
        exploration=noise.exploration[environment : environment + 1],
    )


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_decisions_equal_the_plain_planner(explore, horizon):
    model, generator = make_model(), torch.Generator().manual_seed(3)
    means = 0.3 * torch.randn(4, 3, 2, generator=generator)
    observations = torch.randn(3, 5, generator=generator)
    noise = draw_noise(CONFIG, 3, 2, generator, horizon)
    decision = plan(model, observations, means, noise, CONFIG, 0.99, explore=explore)
    for e in range(3):
        action, mean = plan_one(
            model, observations[e], means[:, e], pick(noise, e), CONFIG, 0.99, explore
        )
        torch.testing.assert_close(decision.actions[e], action, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decision.means[:horizon, e], mean, rtol=1e-4, atol=1e-5)
        assert not decision.means[horizon:, e].any()


@pytest.mark.parametrize(("fraction", "samples"), [(0.0, 24), (0.05, 19), (0.0, 1)])
def test_decisions_without_policy_trajectories_equal_the_plain_planner(fraction, samples):
    config = replace(
        CONFIG, policy_fraction=fraction, samples=samples, elites=min(4, samples), horizon=2
    )
    assert config.policy_samples == 0
    model, generator = make_model(), torch.Generator().manual_seed(3)
    observations, means = torch.randn(3, 5, generator=generator), first_means(config, 3, 2)
    noise = draw_noise(config, 3, 2, generator)
    assert noise.policy.shape == (2, 3, 0, 2)
    decision = plan(model, observations, means, noise, config, 0.99, explore=True)
    for e in range(3):
        action, mean = plan_one(
            model, observations[e], means[:, e], pick(noise, e), config, 0.99, True
        )
        torch.testing.assert_close(decision.actions[e], action, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decision.means[:, e], mean, rtol=1e-4, atol=1e-5)


def test_planning_together_equals_planning_alone():
    model, generator = make_model(), torch.Generator().manual_seed(4)
    observations = torch.randn(5, 5, generator=generator)
    means = first_means(CONFIG, 5, 2)
    noise = draw_noise(CONFIG, 5, 2, generator)
    together = plan(model, observations, means, noise, CONFIG, 0.99)
    for e in range(5):
        alone = plan(
            model, observations[e : e + 1], means[:, e : e + 1], pick(noise, e), CONFIG, 0.99
        )
        torch.testing.assert_close(together.actions[e], alone.actions[0], rtol=1e-4, atol=1e-5)


def test_the_planner_keeps_no_state():
    model, generator = make_model(), torch.Generator().manual_seed(5)
    observations, means = torch.randn(2, 5), 0.1 * torch.ones(4, 2, 2)
    noise = draw_noise(CONFIG, 2, 2, generator)
    first = plan(model, observations, means, noise, CONFIG, 0.99, explore=True)
    second = plan(model, observations, means, noise, CONFIG, 0.99, explore=True)
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.means, second.means)
    assert torch.equal(means, 0.1 * torch.ones(4, 2, 2))


class KnownReward(WorldModel):
    """Latents that stay, no value at the end, and a reward that is largest at one action."""

    best = torch.tensor([0.6, -0.35])

    def predict_reward(self, latent, action):
        return -(action - self.best).square().sum(-1)

    def next_latent(self, latent, action):
        return latent

    def q_values(self, latent, action):
        return [torch.zeros(latent.shape[:-1])]


def test_it_finds_the_best_action_of_a_known_model():
    network = NetworkConfig(encoder_width=4, latent_width=3, hidden_width=4)
    model = KnownReward(Widths.dense(network, 5, 2))
    config = PlannerConfig(horizon=3, iterations=12, samples=512, elites=32, temperature=20.0)
    means = first_means(config, 1, 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        noise = draw_noise(config, 1, 2, generator)
        decision = plan(model, torch.zeros(1, 5), means, noise, config, 0.99)
        means = decision.means
    torch.testing.assert_close(means[:, 0], model.best.expand(3, 2), rtol=0, atol=0.05)
    torch.testing.assert_close(decision.actions[0], model.best, rtol=0, atol=0.15)
    assert decision.std.min() >= config.min_std - 1e-6


def test_margins_are_the_distances_to_the_next_tie():
    empty = torch.zeros(1)
    values = [torch.tensor([[1.0, 9.0, 5.0, 4.5]]), torch.tensor([[8.0, 2.0, 7.75, 4.0]])]
    scores = torch.tensor([[0.6, 0.4]])
    decision = Decision(empty, empty, empty, empty, values, scores)
    gaps, end = margins(decision, torch.tensor([0.5]))  # the first elite of two
    assert gaps.flatten().tolist() == [0.5, 0.25] and end.item() == pytest.approx(0.1)
    decision = replace(decision, scores=torch.tensor([[0.5, 0.2, 0.1, 0.2]]))
    gaps, end = margins(decision, torch.tensor([0.9]))  # the last of all: there is no next
    assert gaps.flatten().tolist() == [torch.inf, 2.0] and end.item() == pytest.approx(0.1)
    gaps, end = margins(replace(decision, scores=torch.ones(1, 1)), torch.tensor([0.9]))
    assert gaps.flatten().tolist() == [4.0, 0.25] and end.item() == torch.inf


def test_actions_stay_in_bounds_with_exploration():
    model, generator = make_model(), torch.Generator().manual_seed(6)
    noise = draw_noise(CONFIG, 64, 2, generator)
    noise = replace(noise, exploration=100 * noise.exploration)
    actions = plan(
        model, torch.randn(64, 5), first_means(CONFIG, 64, 2), noise, CONFIG, 0.99, explore=True
    ).actions
    assert actions.abs().max() == 1


def test_schedules_run_from_start_to_end():
    config = PlannerConfig(horizon=5, start_horizon=1, schedule_decisions=100)
    assert [config.horizon_at(d) for d in (0, 24, 25, 50, 99, 100, 1000)] == [1, 1, 2, 3, 4, 5, 5]
    assert PlannerConfig(horizon=2).horizon_at(0) == 2  # no schedule unless it is asked for
    assert config.min_std_at(0) == 0.5
    assert config.min_std_at(50) == pytest.approx(0.275)
    assert config.min_std_at(1000) == pytest.approx(0.05)


def test_planning_macs_of_the_published_agent():
    """Counted by hand: cartpole observes 5 numbers and acts with 1."""
    network = NetworkConfig(encoder_width=256, latent_width=50, hidden_width=512)
    model = WorldModel(Widths.dense(network, 5, 1))
    config = PlannerConfig(horizon=5, samples=512, elites=64)
    head = 51 * 512 + 512 * 512 + 512
    dynamics = 51 * 512 + 512 * 512 + 512 * 50
    policy = 50 * 512 + 512 * 512 + 512
    sampled = 5 * (dynamics + head) + policy + 2 * head
    expected = 5 * 256 + 256 * 50 + 6 * 512 * sampled + 25 * (sampled + 5 * policy)
    assert planning_macs(model, config) == expected


def test_the_planner_is_traced_whole_by_the_compiler():
    """What CUDA captures; here only the tracing is checked, without generating code."""
    model, generator = make_model(), torch.Generator().manual_seed(7)
    observations, means = torch.randn(2, 5), first_means(CONFIG, 2, 2)
    noise = draw_noise(CONFIG, 2, 2, generator)
    traced = torch.compile(plan, backend="aot_eager", fullgraph=True)
    floor = torch.tensor(0.05)
    decision = traced(model, observations, means, noise, CONFIG, 0.99, floor, explore=True)
    expected = plan(model, observations, means, noise, CONFIG, 0.99, floor, explore=True)
    torch.testing.assert_close(decision.actions, expected.actions)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_decisions_equal_the_cpu_ones():
    model, generator = make_model(), torch.Generator().manual_seed(8)
    observations, means = torch.randn(2, 5), first_means(CONFIG, 2, 2)
    noise = draw_noise(CONFIG, 2, 2, generator)
    expected = plan(model, observations, means, noise, CONFIG, 0.99)
    moved = PlannerNoise(**{name: value.cuda() for name, value in vars(noise).items()})
    captured = torch.compile(plan, mode="reduce-overhead")
    for _ in range(3):
        decision = captured(model.cuda(), observations.cuda(), means.cuda(), moved, CONFIG, 0.99)
    torch.testing.assert_close(decision.actions.cpu(), expected.actions, rtol=1e-3, atol=1e-3)
