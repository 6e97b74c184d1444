"""The update in C: losses, gradients, weights and targets as by PyTorch; hooks; who updates."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc_prune.agent import deciding, learner
from tdmpc_prune.agent.config import LearningConfig, PlannerConfig
from tdmpc_prune.agent.learner import Learner
from tdmpc_prune.agent.replay import Batch
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import NonFiniteLoss, UserError
from tdmpc_prune.native import build
from tdmpc_prune.training import launch
from tdmpc_prune.training.config import TrainConfig
from tests.small import small_config
from tests.test_native import STRICT, compiled

pytestmark = [
    pytest.mark.skipif(learner.unavailable() is not None, reason="there is no C compiler"),
    pytest.mark.xdist_group("native"),
]
WIDTHS = Widths(5, 2, 7, (19,), (23, 9), (8, 11), (13, 6), ((10, 17), (12, 5)))
PLANNER = PlannerConfig(policy_noise=0.5)  # so that some actions are cut off
LEARNING = LearningConfig()


def make_model(widths=WIDTHS, seed=0):
    model = WorldModel(widths)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return model


def make_batch(widths=WIDTHS, size=12, horizon=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return Batch(
        observation=normal(size, widths.observation),
        actions=normal(horizon, size, widths.action).clamp(-1, 1),
        rewards=normal(horizon, size),
        next_observations=normal(horizon, size, widths.observation),
        terminated=(normal(horizon, size) > 1).float(),
        valid=(normal(horizon, size) < 1).float(),
        weights=torch.rand(size, generator=generator),
    )


def watched(one):
    """The gradients that its hooks see, by loss and name."""
    seen = {}
    one.gradient_hooks.append(
        lambda loss, named: seen.update({(loss, name): p.grad.clone() for name, p in named})
    )
    return seen


def pair(model, config=LEARNING):
    """Learners of the same networks, by PyTorch and in C, and the gradients that hooks see."""
    both = [Learner(copy.deepcopy(model), PLANNER, config, path) for path in ("torch", "native")]
    return both, [watched(one) for one in both]


def assert_near(ours, theirs, tolerance, what):
    """Equal to a tolerance relative to the largest element."""
    gap = (ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-3)
    assert ours.shape == theirs.shape and gap <= tolerance, (what, float(gap))


def assert_same_update(both, seen, batch, seed):
    """One update each, the native one as near to one in float64 as PyTorch's, but for 2e-5.

    (LayerNorm of a unit or two makes hundreds of times as much of rounding, by PyTorch too.)
    """
    exact = Learner(copy.deepcopy(both[0].model).double(), PLANNER, both[0].config)
    exact.target.load_state_dict(both[0].target.state_dict())
    found = [watched(exact), *seen]
    doubled = Batch(**{name: value.double() for name, value in vars(batch).items()})
    for one, own, given_ in zip((exact, *both), found, (doubled, batch, batch), strict=True):
        metrics, priorities = one.update(given_, torch.Generator().manual_seed(seed))
        numbers = {name: torch.tensor(value) for name, value in metrics.items()}
        own.update(numbers | {"priorities": torch.from_numpy(priorities)})
    assert list(found[0]) == list(found[1]) == list(found[2])
    for what, value in found[0].items():
        alike = [value]
        if isinstance(what, tuple):  # a gradient is compared to all of its loss
            alike = [v for other, v in found[0].items() if other[0] == what[0]]
        largest = max(float(v.abs().max()) for v in alike)
        off = [float((part[what] - value).abs().max()) for part in found[1:]]
        assert off[1] <= 2e-5 * largest + 4 * off[0] + 1e-7, (what, off, largest)


@st.composite
def some_widths(draw):
    sizes = iter(draw(st.lists(st.integers(1, 40), min_size=15, max_size=15)))

    def hidden(count=2):
        return tuple(next(sizes) for _ in range(count))

    return Widths(
        observation=next(sizes),
        action=draw(st.integers(1, 9)),
        latent=next(sizes),
        encoder=hidden(1),
        dynamics=hidden(),
        reward=hidden(),
        policy=hidden(),
        q_ensemble=tuple(hidden() for _ in range(draw(st.integers(1, 3)))),
    )


@settings(max_examples=60, deadline=None)
@given(
    widths=some_widths(),
    size=st.integers(1, 70),
    horizon=st.integers(1, 6),
    clip=st.sampled_from([0.01, 10.0]),
    seed=st.integers(0, 1000),
)
def test_losses_and_gradients_are_pytorchs(widths, size, horizon, clip, seed):
    config = replace(LEARNING, gradient_clip=clip)
    both, seen = pair(make_model(widths, seed), config)
    for one in both:  # targets that differ from the networks
        one.target.load_state_dict(make_model(widths, seed + 1).state_dict())
    assert_same_update(both, seen, make_batch(widths, size, horizon, seed), seed)


def test_weights_and_targets_are_pytorchs_after_many_updates():
    both, _ = pair(make_model())
    for number in range(20):
        for one in both:
            one.update(make_batch(seed=number), torch.Generator().manual_seed(number))
    # Adam's steps are of the learning rate's size, whatever the gradient's; rounding grows to this.
    for part in ("model", "target"):
        for (name, ours), theirs in zip(
            getattr(both[0], part).named_parameters(),
            getattr(both[1], part).parameters(),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4, msg=name)
    assert both[0].state().keys() == both[1].state().keys()
    assert all(value == 20 for name, value in both[1].state().items() if ".step." in name)


@pytest.mark.parametrize("updates", [1, 2, 50])
def test_adam_and_the_moving_average_are_pytorchs_on_the_same_gradients(updates):
    both, _ = pair(make_model())
    gradients = {}

    def give(loss, named):
        for name, parameter in named:
            parameter.grad.copy_(gradients[name])

    both[0].gradient_hooks.append(
        lambda _, named: gradients.update((name, parameter.grad) for name, parameter in named)
    )
    both[1].gradient_hooks.append(give)
    batch = make_batch()
    for number in range(updates):
        for one in both:
            one.update(batch, torch.Generator().manual_seed(number))
    states = [one.state() | one.model.state_dict() for one in both]
    for name, value in states[0].items():
        assert_near(value, states[1][name], 1e-5, name)


def test_members_that_are_equal_share_the_policys_gradient():
    model = make_model(replace(WIDTHS, q_ensemble=((10, 17),) * 3))
    for member in model.q_ensemble[1:]:
        member.load_state_dict(model.q_ensemble[0].state_dict())
    both, seen = pair(model, replace(LEARNING, learning_rate=1e-9))
    assert_same_update(both, seen, make_batch(), 0)


def test_losses_that_are_cut_off_give_no_gradient():
    batch = make_batch()
    batch.rewards[:, ::3] = 1e3
    batch.rewards[:, 1::3] = 1e15
    both, seen = pair(make_model())
    assert_same_update(both, seen, batch, 0)
    _, priorities = both[1].update(batch, torch.Generator().manual_seed(0), learn=False)
    assert (priorities <= 1e4).all() and (priorities == 1e4).any()


def test_a_gradient_shown_alone_changes_nothing():
    both, seen = pair(make_model())
    before = copy.deepcopy(both[1].state() | both[1].model.state_dict())
    for one in both:
        one.update(make_batch(), torch.Generator().manual_seed(0), learn=False)
    after = both[1].state() | both[1].model.state_dict()
    assert before.keys() == after.keys() and both[1].updates == 0
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name, gradient in seen[0].items():
        assert_near(gradient, seen[1][name], 1e-4, name)


@pytest.mark.parametrize(
    ("field", "term"), [("rewards", "reward loss"), ("next_observations", "consistency loss")]
)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_named_as_by_pytorch_and_changes_nothing(field, term, wrong):
    both, _ = pair(make_model())
    batch = make_batch()
    getattr(batch, field)[0, 3] = wrong
    batch.valid[:] = 1
    before = copy.deepcopy(both[1].state() | both[1].model.state_dict())
    told = []
    for one in both:
        with pytest.raises(NonFiniteLoss) as error:
            one.update(batch, torch.Generator().manual_seed(0))
        told.append(error.value.term)
    assert told[0] == told[1] and (told[0] == term or wrong == torch.inf)
    after = both[1].state() | both[1].model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert both[1].updates == 0
    both[1].update(make_batch(), torch.Generator().manual_seed(0))  # nothing of it is left


def test_updates_go_on_after_tensors_were_cut_replaced_and_loaded():
    """As surgery does it: the same parameters with other data, and moments likewise."""
    both, seen = pair(make_model())
    for one in both:
        one.update(make_batch(), torch.Generator().manual_seed(0))
    kept = torch.tensor([0, 2, 3, 7])
    whole = {name: p.detach().clone() for name, p in both[0].model.named_parameters()}
    for one in both:
        for net in (one.model, one.target):
            net.load_state_dict(whole)
        for net in (one.model, one.target):
            first, second = net.reward[0], net.reward[2]
            for parameter, dim in ((first.weight, 0), (first.bias, 0), (second.weight, 1)):
                kind = torch.Tensor.index_select
                parameter.grad = None
                parameter.data = kind(parameter.data, dim, kept)
                if state := one.optimisers["model_loss"].state.get(parameter):
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = kind(state[key], dim, kept)
        latent = one.model.encoder[2].weight
        latent.data = latent.data.T.contiguous().T  # the same numbers, column by column
    assert both[1].model.widths == both[0].model.widths
    assert both[1].model.widths.reward == (4, 11)
    assert_same_update(both, seen, make_batch(seed=1), 1)


def test_another_learner_goes_on_bit_for_bit_from_a_saved_state():
    one = Learner(make_model(), PLANNER, LEARNING, "native")
    for number in range(3):
        one.update(make_batch(seed=number), torch.Generator().manual_seed(number))
    other = Learner(copy.deepcopy(one.model), PLANNER, LEARNING, "native")
    other.load_state(copy.deepcopy(one.state()), one.updates)
    # The first has seen larger batches, and has what they left in its buffers.
    one.update(make_batch(size=40), torch.Generator().manual_seed(9), learn=False)
    for number in range(3, 6):
        results = [
            each.update(make_batch(seed=number), torch.Generator().manual_seed(number))
            for each in (one, other)
        ]
        assert results[0][0] == results[1][0]
        assert np.array_equal(results[0][1], results[1][1])
    states = [each.state() | each.model.state_dict() for each in (one, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# --- Who updates -----------------------------------------------------------------------------


@pytest.fixture
def wrong_losses(monkeypatch):
    monkeypatch.setattr(learner, "library", _refused)


def _refused():
    raise build.Unavailable("what cc made differs from PyTorch by 1.0e+00")


def test_a_run_updates_on_the_path_that_it_decides_on(tmp_path):
    for path in ("native", "torch"):
        run = launch.start(small_config(tmp_path / path, decisions=path), [])
        assert (run.trainee.learner._fused is not None) == (path == "native")


def test_where_losses_cannot_be_had_all_is_left_to_pytorch_and_it_is_said(wrong_losses, tmp_path):
    run = launch.start(small_config(tmp_path / "run"), [])
    assert run.trainee.learner._fused is None and run.trainee.remark == (
        "decisions by PyTorch, because what cc made differs from PyTorch by 1.0e+00"
    )
    assert deciding.choose("auto", WIDTHS, torch.device("cpu")).path == "native"  # without updates
    with pytest.raises(UserError, match="decisions=native cannot be, because what cc made"):
        launch.start(small_config(tmp_path / "other", decisions="native"), [])


def test_a_native_run_is_not_resumed_where_its_updates_cannot_be_made(small_run, wrong_losses):
    with pytest.raises(UserError, match="was begun with decisions=native, and cannot go on"):
        launch.resume(TrainConfig(resume=str(small_run[0])), ["resume"])


def test_losses_that_differ_are_found_before_they_are_used(monkeypatch):
    loaded = learner.library()

    class Wrong:
        def __getattr__(self, name):
            return getattr(loaded, name)

        def learner_policy_loss(self, *arguments):
            loaded.learner_policy_loss(*arguments)
            arguments[-1]._obj.value += 0.01

    assert learner._difference(loaded) is None
    assert "differs from PyTorch by" in learner._difference(Wrong())


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
@pytest.mark.parametrize("flags", [["-O2", "-DPLANNER_WIDTH=1"], ["-O2"], ["-O3", "-march=native"]])
def test_every_build_is_without_warnings_and_equals_pytorch(tmp_path, flags):
    library = compiled(tmp_path, *STRICT, *flags, source=build.LEARNER[-1])
    assert learner._difference(library) is None
