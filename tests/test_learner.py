"""The update: the same numbers as the plain implementation, masks, hooks, non-finite losses."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tdmpc_prune.agent.config import PRESETS, LearningConfig, NetworkConfig, PlannerConfig
from tdmpc_prune.agent.learner import (
    Learner,
    NonFiniteLoss,
    model_loss,
    policy_loss,
    unavailable,
    update_macs,
)
from tdmpc_prune.agent.replay import Batch
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tests.reference import PlainLearner

NETWORK = NetworkConfig(encoder_width=16, latent_width=8, hidden_width=24)
PLANNER = PlannerConfig()
LEARNING = LearningConfig(batch=12, horizon=4)


def make_model(q_members=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    network = replace(NETWORK, q_members=q_members)
    model = WorldModel(Widths.dense(network, 5, 2), generator)
    for parameter in model.parameters():  # heads that start at zero would hide mistakes
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_batch(seed=0, size=12, horizon=4):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    ends = torch.randint(1, 2 * horizon, (size,), generator=generator)
    steps = torch.arange(horizon)[:, None]
    return Batch(
        observation=normal(size, 5),
        actions=normal(horizon, size, 2).clamp(-1, 1),
        rewards=normal(horizon, size),
        next_observations=normal(horizon, size, 5),
        terminated=((steps == ends - 1) & (ends % 2 == 0)).float(),
        valid=(steps < ends).float(),
        weights=torch.rand(size, generator=generator),
    )


@pytest.mark.parametrize("q_members", [1, 2, 4])
def test_updates_equal_the_plain_implementation(q_members):
    model = make_model(q_members)
    learner = Learner(copy.deepcopy(model), PLANNER, LEARNING)
    plain = PlainLearner(copy.deepcopy(model), copy.deepcopy(model), PLANNER, LEARNING)
    for update in range(5):
        batch = make_batch(update)
        noise = torch.randn(9, 12, 2, generator=torch.Generator().manual_seed(update))
        metrics, priorities = learner.update(batch, torch.Generator().manual_seed(update))
        expected, expected_priorities = plain.update(batch, noise)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (update, name)
        np.testing.assert_allclose(priorities, expected_priorities.numpy(), rtol=1e-3, atol=1e-4)
    for ours, theirs in ((learner.model, plain.model), (learner.target, plain.target)):
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(
                value, theirs.state_dict()[name], rtol=1e-3, atol=2e-4, msg=name
            )


def test_what_lies_beyond_the_end_of_an_episode_changes_nothing():
    model, batch = make_model(), make_batch()
    target = copy.deepcopy(model)
    noise = torch.zeros(4, 12, 2)
    beyond = batch.valid == 0
    assert beyond.any()
    changed = replace(
        batch,
        rewards=torch.where(beyond, 100.0, batch.rewards),
        terminated=torch.where(beyond, 1.0, batch.terminated),
        next_observations=torch.where(beyond[..., None], 7.0, batch.next_observations),
        actions=torch.where(beyond[..., None], 0.5, batch.actions),
    )
    before = model_loss(model, target, batch, noise, LEARNING)
    after = model_loss(model, target, changed, noise, LEARNING)
    torch.testing.assert_close(before.total, after.total)
    torch.testing.assert_close(before.priorities, after.priorities)


def test_termination_masks_the_td_target():
    """A terminal decision is worth its reward alone, whatever the networks say of what follows."""
    model, batch = make_model(), make_batch()
    target, noise = copy.deepcopy(model), torch.zeros(4, 12, 2)
    terminal = replace(batch, terminated=torch.ones(4, 12), valid=torch.ones(4, 12))
    before = model_loss(model, target, terminal, noise, LEARNING).value
    for member in target.q_ensemble:
        member[-1].bias.data += 50
    assert model_loss(model, target, terminal, noise, LEARNING).value == before
    going_on = replace(terminal, terminated=torch.zeros(4, 12))
    assert model_loss(model, target, going_on, noise, LEARNING).value > 100 * before


def test_each_loss_trains_its_own_parameters():
    learner = Learner(make_model(), PLANNER, LEARNING)
    seen = {}

    def hook(loss, parameters):
        seen[loss] = {name: parameter.grad.clone() for name, parameter in parameters}
        weights[loss] = copy.deepcopy(learner.model.state_dict())

    weights = {}
    before = copy.deepcopy(learner.model.state_dict())
    learner.gradient_hooks.append(hook)
    learner.update(make_batch(), torch.Generator().manual_seed(0))
    policy = {name for name in before if name.startswith("policy")}
    assert set(seen["model_loss"]) == set(before) - policy
    assert all(gradient.any() for gradient in seen["model_loss"].values())
    assert set(seen["policy_loss"]) == policy
    assert all(gradient.any() for gradient in seen["policy_loss"].values())
    # Between the backward pass and the optimiser step:
    assert all(torch.equal(weights["model_loss"][name], before[name]) for name in before)
    assert all(torch.equal(weights["policy_loss"][name], before[name]) for name in policy)
    assert not torch.equal(learner.model.state_dict()["policy.0.weight"], before["policy.0.weight"])


def test_hooks_are_left_out_of_updates_that_are_not_watched():
    seen, models = [], []
    for watched in (True, False):
        learner = Learner(make_model(), PLANNER, LEARNING)
        learner.gradient_hooks.append(lambda loss, parameters, by=watched: seen.append(by))
        learner.update(make_batch(), torch.Generator().manual_seed(0), watched=watched)
        models.append(learner.model.state_dict())
    assert seen == [True, True]  # of either loss
    assert all(torch.equal(weights, models[1][name]) for name, weights in models[0].items())


@pytest.mark.parametrize("path", ["torch", "native"])
def test_the_average_is_of_a_window_that_grows_with_the_updates(path):
    if path == "native" and (reason := unavailable()):
        pytest.skip(reason)
    config = replace(LEARNING, updates_per_decision=2.0, averaged_updates=8)
    learner = Learner(make_model(), PLANNER, config, path)
    expected, models = None, 0
    for update in range(1, 41):
        learner.update(make_batch(), torch.Generator().manual_seed(update))
        if update % 2:
            continue
        models += 1
        rate = min(1, max(2 / min(8, update / 4), 1 / models))
        now = {name: w.double() for name, w in learner.model.state_dict().items()}
        expected = expected or now
        expected = {n: w + rate * (now[n] - w) for n, w in expected.items()}
    average = learner.average.state_dict()
    assert models == learner.averaged == 20
    assert all(torch.allclose(average[n].double(), w, atol=1e-5) for n, w in expected.items())
    assert not any(weights.requires_grad for weights in learner.average.parameters())
    before = learner.model.state_dict()["policy.0.weight"].clone()
    learner.settle()
    settled = learner.model.state_dict()
    assert all(torch.equal(settled[name], weights) for name, weights in average.items())
    assert not torch.equal(settled["policy.0.weight"], before)
    assert learner.average is None and all(p.requires_grad for p in learner.model.parameters())
    learner.update(make_batch(), torch.Generator().manual_seed(0))
    learner.update(make_batch(), torch.Generator().manual_seed(0))
    assert learner.averaged == 1
    for name, weights in learner.average.state_dict().items():
        assert torch.equal(weights, learner.model.state_dict()[name])


def test_without_a_window_there_is_no_average():
    learner = Learner(make_model(), PLANNER, replace(LEARNING, averaged_updates=0))
    learner.update(make_batch(), torch.Generator().manual_seed(0))
    assert learner.average is None and not learner.averaged


def test_what_only_shows_gradients_is_not_averaged():
    learner = Learner(make_model(), PLANNER, LEARNING)
    learner.update(make_batch(), torch.Generator().manual_seed(0), learn=False)
    assert learner.average is None


def test_the_learning_rate_falls_over_the_last_fifth_of_a_run():
    rates = [LEARNING.rate_at(done) for done in (0, 0.5, 0.8, 0.9, 0.99, 1.0)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 5e-5, 5e-5])
    assert replace(LEARNING, cooldown=0.0).rate_at(1.0) == 1e-3
    assert PRESETS["paper"].value.learning.rate_at(1.0) == 1e-3


@pytest.mark.parametrize("path", ["torch", "native"])
def test_the_rate_of_an_update_is_that_of_both_optimisers(path):
    if path == "native" and (reason := unavailable()):
        pytest.skip(reason)
    moved = []
    for rate in (None, 1e-4):
        learner = Learner(make_model(), PLANNER, LEARNING, path)
        before = copy.deepcopy(learner.model.state_dict())
        learner.update(make_batch(), torch.Generator().manual_seed(0), rate=rate)
        weights = learner.model.state_dict()
        moved.append({n: float((w - before[n]).abs().mean()) for n, w in weights.items()})
    for name, far in moved[0].items():
        assert far == pytest.approx(10 * moved[1][name], rel=0.01), name


def test_gradients_are_clipped():
    learner = Learner(make_model(), PLANNER, replace(LEARNING, gradient_clip=1e-3))
    norms = []
    learner.gradient_hooks.append(
        lambda loss, parameters: norms.append(
            torch.stack([p.grad.norm() for _, p in parameters]).norm().item()
        )
    )
    learner.update(make_batch(), torch.Generator().manual_seed(0))
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("field", "term"), [("rewards", "reward loss"), ("next_observations", "consistency loss")]
)
def test_a_non_finite_loss_names_its_term_and_changes_nothing(field, term):
    learner = Learner(make_model(), PLANNER, LEARNING)
    batch = make_batch()
    before = copy.deepcopy(learner.model.state_dict())
    broken = replace(batch, **{field: torch.full_like(getattr(batch, field), torch.nan)})
    with pytest.raises(NonFiniteLoss) as error:
        learner.update(broken, torch.Generator().manual_seed(0))
    assert error.value.term == term
    assert all(
        torch.equal(value, before[name]) for name, value in learner.model.state_dict().items()
    )
    assert learner.updates == 0


def test_the_losses_are_traced_whole_by_the_compiler():
    """What CUDA captures; here only the tracing is checked, without generating code."""
    model, batch = make_model(), make_batch()
    target, noise = copy.deepcopy(model), torch.zeros(5, 12, 2)
    traced = torch.compile(model_loss, backend="aot_eager", fullgraph=True)
    expected = model_loss(model, target, batch, noise[:4], LEARNING)
    losses = traced(model, target, batch, noise[:4], LEARNING)
    torch.testing.assert_close(losses.total, expected.total)
    losses.total.backward()
    traced = torch.compile(policy_loss, backend="aot_eager", fullgraph=True)
    valid = torch.ones(5, 12)
    torch.testing.assert_close(
        traced(model, expected.latents, valid, noise, LEARNING),
        policy_loss(model, expected.latents, valid, noise, LEARNING),
    )


def test_the_multiply_accumulates_of_an_update_are_about_those_that_are_made():
    model, batch = make_model(), make_batch()
    target, noise = copy.deepcopy(model), torch.zeros(5, 12, 2)
    policy = list(model.policy.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("policy.")]
    with FlopCounterMode(display=False) as counted:
        losses = model_loss(model, target, batch, noise[:4], LEARNING)
        torch.autograd.grad(losses.total, others)
        loss = policy_loss(model, losses.latents, torch.ones(5, 12), noise, LEARNING)
        torch.autograd.grad(loss, policy)
    config = replace(LEARNING, batch=12, horizon=4)
    made = counted.get_total_flops() / 2
    assert made == pytest.approx(update_macs(model, config), rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_updates_equal_the_cpu_ones():
    on_cpu, on_cuda = (
        Learner(make_model().to(device), PLANNER, LEARNING) for device in ("cpu", "cuda")
    )
    noise = torch.zeros(4, 12, 2)
    for update in range(4):
        batch = make_batch(update)
        moved = Batch(**{name: value.cuda() for name, value in vars(batch).items()})
        loss = on_cuda._model_loss(on_cuda.model, on_cuda.target, moved, noise.cuda(), LEARNING)
        expected = model_loss(on_cpu.model, on_cpu.target, batch, noise, LEARNING)
        torch.testing.assert_close(loss.total.cpu(), expected.total, rtol=1e-3, atol=1e-4)
        metrics, _ = on_cuda.update(moved, torch.Generator("cuda").manual_seed(0))
        assert all(np.isfinite(value) for value in metrics.values())
        on_cpu.model.load_state_dict(on_cuda.model.state_dict())
        on_cpu.target.load_state_dict(on_cuda.target.state_dict())
