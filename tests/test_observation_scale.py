"""Learning at the scale of observations: the same as of observations that are scaled."""

import copy
from dataclasses import replace

import pytest
import torch

from tdmpc_prune.agent import learner
from tdmpc_prune.agent.config import LearningConfig, PlannerConfig
from tdmpc_prune.agent.learner import Learner
from tdmpc_prune.agent.observation_scale import ObservationScale
from tdmpc_prune.agent.replay import Batch
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.training import launch
from tests.small import small_config
from tests.test_fused import make_batch, make_model

WIDTHS = Widths(5, 2, 7, (19,), (23, 9), (8, 11), (13, 6), ((10, 17), (12, 5)))
SIZES = torch.tensor([0.02, 1.0, 30.0, 4.0, 700.0], dtype=torch.float64)
CENTRES = torch.tensor([0.0, -2.0, 100.0, 0.1, 700.0], dtype=torch.float64)
CONFIG = LearningConfig(gradient_clip=0.5, averaged_updates=8)


def doubled(batch):
    return Batch(**{name: value.double() for name, value in vars(batch).items()})


def raw(batch):
    """The batch whose observations, scaled, are those of `batch`."""
    scale = ObservationScale.of(observations())
    return replace(
        batch,
        observation=batch.observation * scale.size + scale.centre,
        next_observations=batch.next_observations * scale.size + scale.centre,
    )


def observations():
    """Some with exactly these means and deviations."""
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    return ends * SIZES + CENTRES


def scaled_and_raw(updates=10):
    """Two learners after the same updates, one of scaled observations, one with a scale."""
    one = Learner(make_model(WIDTHS).double(), PlannerConfig(), CONFIG)
    other = Learner(copy.deepcopy(one.model), PlannerConfig(), CONFIG)
    other.take_scale(observations())
    for seed in range(updates):
        batch = doubled(make_batch(WIDTHS, seed=seed))
        for each, seen in ((one, batch), (other, raw(batch))):
            each.update(seen, torch.Generator().manual_seed(seed))
    return one, other


def test_it_is_learnt_as_from_scaled_observations():
    one, other = scaled_and_raw()
    batch = doubled(make_batch(WIDTHS, seed=77))
    for name in ("model", "target", "average"):
        scaled, unscaled = getattr(one, name), getattr(other, name)
        expected = scaled.encode(batch.next_observations)
        found = unscaled.encode(raw(batch).next_observations)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        scale = ObservationScale.of(observations())
        scale.fold(scaled.encoder[0])
        for (what, ours), theirs in zip(
            unscaled.named_parameters(), scaled.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8, msg=what)


def test_without_a_scale_it_would_not_be():
    """The test above can fail: the same two without what it is about."""
    one, other = scaled_and_raw(updates=0)
    other.scale = None
    batch = doubled(make_batch(WIDTHS, seed=0))
    for each, seen in ((one, batch), (other, raw(batch))):
        each.update(seen, torch.Generator().manual_seed(0))
    expected = one.model.encode(batch.next_observations)
    found = other.model.encode(raw(batch).next_observations)
    assert (found - expected).abs().max() > 0.01


def test_hooks_see_the_gradients_of_the_weights_as_they_are():
    """Which do not depend on how they are learnt from."""
    seen = []
    for with_scale in (False, True):
        own = Learner(
            make_model(WIDTHS).double(), PlannerConfig(), replace(CONFIG, gradient_clip=1e9)
        )
        if with_scale:
            own.scale = ObservationScale.of(observations())
        first = own.model.encoder[0]
        own.gradient_hooks.append(
            lambda loss, named, first=first: (
                loss == "model_loss"
                and seen.append((first.weight.grad.clone(), first.bias.grad.clone()))
            )
        )
        own.update(raw(doubled(make_batch(WIDTHS))), torch.Generator().manual_seed(0))
    (plain, plain_bias), (scaled, scaled_bias) = seen
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled_bias, plain_bias)


@pytest.mark.skipif(learner.unavailable() is not None, reason="there is no C compiler")
def test_updates_in_c_have_the_same_scale():
    both = [Learner(make_model(WIDTHS), PlannerConfig(), CONFIG, p) for p in ("torch", "native")]
    for own in both:
        own.take_scale(observations().float())
    for seed in range(5):
        batch = make_batch(WIDTHS, seed=seed)
        batch = Batch(**{name: value.float() for name, value in vars(raw(batch)).items()})
        for own in both:
            own.update(batch, torch.Generator().manual_seed(seed))
    for (name, ours), theirs in zip(
        both[0].model.named_parameters(), both[1].model.parameters(), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max(), name


def test_what_is_small_is_enlarged_and_what_is_huge_shrunk():
    spread = torch.tensor([0.0, 0.001, 0.05, 0.5, 1.0, 3.0, 10.0, 1000.0])
    scale = ObservationScale.of(torch.stack([7 - spread, 7 + spread]))
    expected = torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 100.0])
    torch.testing.assert_close(scale.size, expected, rtol=1e-4, atol=0)
    assert scale.centre.tolist() == pytest.approx([0, 0, 0, 7, 0, 0, 0, 7])
    near = ObservationScale.of(torch.stack([1 - spread, 1 + spread]))
    assert near.size[2] == pytest.approx(0.05) and near.centre[2] == pytest.approx(1)
    tiny = ObservationScale.of(torch.tensor([[-0.02], [0.02]]))  # enlarged by so much and no more
    assert tiny.size.tolist() == pytest.approx([0.05])


def test_it_goes_on_after_a_resume():
    _, own = scaled_and_raw(updates=3)
    again = Learner(copy.deepcopy(own.model), PlannerConfig(), CONFIG)
    again.load_state(copy.deepcopy(own.state()), own.updates)
    batch = raw(doubled(make_batch(WIDTHS, seed=9)))
    for each in (own, again):
        each.update(batch, torch.Generator().manual_seed(9))
    for ours, theirs in zip(own.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_new_networks_of_a_run_are_drawn_for_its_scale_which_stays(tmp_path):
    trained = launch.start(small_config(tmp_path / "run"), [])
    trained.run()
    trainee, widths = trained.trainee, trained.trainee.model.widths
    assert trainee.learner.scale is not None
    plain = WorldModel(widths, torch.Generator().manual_seed(5)).encoder[0]
    scale = trainee.learner.scale = ObservationScale(torch.tensor([3.0]), torch.tensor([0.5]))
    drawn = trainee.draw(widths, 5)
    torch.testing.assert_close(drawn.encoder[0].weight, plain.weight / 0.5)
    torch.testing.assert_close(drawn.encoder[0].bias, -3 * drawn.encoder[0].weight[:, 0])
    trained.take_networks(drawn)
    assert trainee.learner.scale is scale
