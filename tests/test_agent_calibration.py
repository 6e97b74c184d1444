"""An agent's own data for cuts made good: where it starts, what it tries, what it is taught."""

import copy
import itertools

import numpy as np
import pytest
import torch

from tdmpc_prune.agent import distillation
from tdmpc_prune.agent.calibration import (
    SEQUENCES,
    add_plans,
    agent_calibration,
    draw_pool,
    is_head,
    latent_channels,
    lessons,
    roll_out,
)
from tdmpc_prune.agent.computation import agent_computation
from tdmpc_prune.agent.deciding import deciding, unavailable
from tdmpc_prune.agent.distillation import Teacher, Teaching, distil, latent_steps
from tdmpc_prune.agent.planner import first_means
from tdmpc_prune.agent.replay import Episode, SequenceReplay
from tdmpc_prune.agent.world_model import Widths, WorldModel
from tdmpc_prune.errors import NonFiniteLoss, UserError
from tdmpc_prune.prunable import component_parameters
from tdmpc_prune.pruning import compensation, rotation
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.layers import Watch
from tdmpc_prune.pruning.refit import all_channels, kept_channels, refit
from tdmpc_prune.pruning.surgery import commit
from tests.small import AGENT

OBSERVATION, ACTION, HORIZON = 4, 2, 3
DISCOUNT = AGENT.learning.discount
PATH = "torch"  # who plans


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    model = WorldModel(Widths.dense(AGENT.network, OBSERVATION, ACTION), generator)
    with torch.no_grad():  # the heads start at zero
        for head in (model.reward, *model.q_ensemble):
            head[-1].weight.normal_(generator=generator)
    return model


def replay_with(*lengths, capacity=None):
    replay = SequenceReplay.of(AGENT.learning, OBSERVATION, ACTION, capacity)
    rng = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        replay.add(
            Episode(
                rng.normal(size=(length + 1, OBSERVATION)).astype(np.float32) + 100 * number,
                rng.uniform(-1, 1, (length, ACTION)).astype(np.float32),
                rng.normal(size=length).astype(np.float32),
                False,
            )
        )
    return replay


def test_starts_have_their_whole_sequence_in_one_episode(model):
    """In a ring that has wrapped, the executed actions follow their start."""
    replay = replay_with(40, 40, 40, capacity=70)
    pool = draw_pool(model, replay, HORIZON, 60)
    assert pool.observations.shape == (60, OBSERVATION)
    assert pool.actions.shape == (HORIZON, 60, SEQUENCES, ACTION)
    assert float(pool.actions.abs().max()) <= 1
    held = replay.state()
    for n in range(60):
        (place,) = np.flatnonzero((held["observations"] == pool.observations[n].numpy()).all(1))
        assert held["left"][place] > HORIZON
        places = (place + np.arange(HORIZON)) % 70
        np.testing.assert_array_equal(pool.actions[:, n, 0], held["actions"][places])
    recent = pool.observations[:, 0] > 150
    assert 0.5 < recent.float().mean() < 0.9  # a half, and what the rest has of them
    again = draw_pool(model, replay, HORIZON, 60)
    assert torch.equal(pool.actions, again.actions)
    other = draw_pool(model, replay, HORIZON, 60, seed=1)
    assert not torch.equal(pool.actions, other.actions)


@pytest.mark.parametrize("lengths", [(), (2, 3, 3)])
def test_a_buffer_without_a_sequence_is_refused(model, lengths):
    with pytest.raises(UserError, match="no 4 decisions in a row"):
        draw_pool(model, replay_with(*lengths), HORIZON, 10)


def test_lessons_are_what_the_agent_computes(model):
    pool = draw_pool(model, replay_with(60), HORIZON, 30)
    parts = lessons(model, pool)
    assert [len(part.observations) for part in parts] == [3] * 10
    latent = model.encode(parts[1].observations)
    torch.testing.assert_close(parts[1].latents[0, :, 3], latent)
    latent = model.next_latent(latent, parts[1].actions[0, :, 3])
    torch.testing.assert_close(parts[1].latents[1, :, 3], latent)
    torch.testing.assert_close(parts[1].policy[1, :, 3], model.act(latent))
    assert parts[0].ends.shape == (HORIZON + 1, 3, SEQUENCES, ACTION)


def cut(model, sparsity, starts=300):
    """The whole agent, rotated; a cut and refitted copy; and all that was used for it."""
    whole, target = copy.deepcopy(model), copy.deepcopy(model)
    pool = draw_pool(whole, replay_with(60, 60), HORIZON, starts)
    calibration = agent_calibration(whole, pool, AGENT)
    computation = agent_computation(whole, target, AGENT)
    structure = find_groups(computation)
    (group,) = [group for group in structure.groups if group.coupling]
    readings = compensation.read(whole, calibration.batches(whole), calibration)
    turn = rotation.principal(group, structure, whole, readings)
    readings = rotation.rotate(group.name, turn, structure, computation, readings)
    ranking = compensation.rank(structure, whole, readings)
    dense = {name: sum(p.numel() for p in own) for name, own in component_parameters(model).items()}
    floors = compensation.lift_normed(structure, whole, dict.fromkeys(structure.widths, 2))
    plan = compensation.plan_by_gains(structure, ranking, floors, sparsity, dense)
    student, target = copy.deepcopy((whole, target))
    networks = agent_computation(student, target, AGENT)
    commit(plan, structure, networks)
    plain = copy.deepcopy(student)
    report = refit(plan, structure, whole, networks.networks, calibration)
    latents = latent_channels(kept_channels(plan, structure, whole), whole)
    return whole, student, plain, target, pool, latents, report


def test_an_agent_is_rotated_cut_and_refitted(model):
    whole, student, plain, target, pool, latents, report = cut(model, 0.4)
    observations = torch.randn(20, OBSERVATION)
    torch.testing.assert_close(
        whole.predict_reward(whole.encode(observations), torch.zeros(20, ACTION)),
        model.predict_reward(model.encode(observations), torch.zeros(20, ACTION)),
        rtol=1e-4,
        atol=1e-5,
    )
    assert not report.left
    fitted = {fit.layer: fit for fit in report.layers}
    assert set(fitted) == {name.rpartition(".")[0] for name, _ in whole.named_parameters()}
    assert all(fit.after <= fit.before for fit in report.layers)
    assert fitted["reward.4"].after < 0.5 * fitted["reward.4"].before
    teaching = Teaching.of(whole, pool, latents, DISCOUNT)
    starts = torch.arange(len(pool.observations))
    with torch.no_grad():
        assert teaching.error(student, starts) < 0.3 * teaching.error(plain, starts)
    assert all(
        torch.equal(one, other)
        for one, other in zip(student.parameters(), target.parameters(), strict=True)
    )


def test_a_stage_that_goes_only_as_far_as_needed_computes_the_same(model):
    pool = draw_pool(model, replay_with(60), HORIZON, 30)
    calibration = agent_calibration(model, pool, AGENT)
    other = copy.deepcopy(model)
    channels = all_channels(model)
    batch = calibration.batches(model)[0]
    for stage in calibration.stages:
        for network, wave in itertools.product((model, other), stage.layers):
            with torch.no_grad(), Watch(network, wave) as whole:
                stage.run(network, batch, channels)
            with torch.no_grad(), Watch(network, wave) as needed:
                stage.run_to(wave, network, batch, channels)
            assert set(needed.calls) == set(wave)
            for layer in wave:
                pairs = zip(whole.calls[layer], needed.calls[layer], strict=True)
                for one, same in pairs:
                    assert torch.equal(one.input, same.input)
                    assert torch.equal(one.output, same.output)


def test_readings_are_the_same_of_frozen_networks(model):
    frozen = copy.deepcopy(model).requires_grad_(False)
    pool = draw_pool(model, replay_with(60), HORIZON, 30)
    calibration = agent_calibration(model, pool, AGENT)
    readings = [
        compensation.read(network, calibration.batches(network), calibration)
        for network in (model, frozen)
    ]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for layer, reading in readings[0].items():
        assert torch.equal(reading.gradient, readings[1][layer].gradient)
        assert torch.equal(reading.weighed, readings[1][layer].weighed)


def test_a_calibration_can_be_of_some_layers_only(model):
    pool = draw_pool(model, replay_with(60), HORIZON, 30)
    heads = agent_calibration(model, pool, AGENT).only(is_head)
    (stage,) = heads.stages
    assert stage.layers[0] == ("reward.0", "policy.0", "q_ensemble.0.0", "q_ensemble.1.0")
    last = heads.only(lambda layer: layer.endswith(".5"))
    assert last.stages[0].layers == (("q_ensemble.0.5", "q_ensemble.1.5"),)


def test_latent_steps_and_distillation_follow_the_teacher(model):
    whole, student, _, _, pool, latents, _ = cut(model, 0.5)
    teaching = Teaching.of(whole, pool, latents, DISCOUNT)
    heads = copy.deepcopy(student.reward.state_dict())
    losses = latent_steps(student, teaching, steps=60)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert all(torch.equal(heads[n], t) for n, t in student.reward.state_dict().items())
    teacher = Teacher(whole, lambda _: pool, latents, AGENT, PATH)
    losses = distil(student, teacher, steps=60)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert all(parameter.grad is None for parameter in student.parameters())
    twin = copy.deepcopy(student)
    assert distil(student, teacher, steps=3) == distil(twin, teacher, steps=3)


def test_a_student_is_taught_along_new_data_and_the_plans_it_makes_then(model, monkeypatch):
    whole, student, _, _, _, latents, _ = cut(model, 0.5)
    drawn, planned = [], []

    def pool(number):
        drawn.append(number)
        return draw_pool(whole, replay_with(60, 60), HORIZON, 30, seed=number)

    def plans(pool, planner, *rest, of=distillation.add_plans):
        planned.append((planner, copy.deepcopy(planner.state_dict()), of(pool, planner, *rest)))
        return planned[-1][2]

    monkeypatch.setattr(distillation, "_SAME", 4)
    monkeypatch.setattr(distillation, "_PLANNED", 20)
    monkeypatch.setattr(distillation, "add_plans", plans)
    distil(student, Teacher(whole, pool, latents, AGENT, PATH), steps=10, done=300)
    assert drawn == [300, 304, 308]
    assert all(planner is student for planner, *_ in planned)
    assert [len(pool.observations) for *_, pool in planned] == [20, 20, 20]
    first, second = (weights["encoder.0.weight"] for _, weights, _ in planned[:2])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("path", ["torch", "native"])
def test_plans_and_what_lies_around_them_are_further_sequences(model, path):
    if path == "native" and unavailable():
        pytest.skip(unavailable())
    pool = draw_pool(model, replay_with(60, 60), HORIZON, 150)
    more = add_plans(pool, model, AGENT, path, seed=3)
    assert torch.equal(more.observations, pool.observations)
    assert torch.equal(more.actions[:, :, :SEQUENCES], pool.actions)
    around = more.actions[:, :, SEQUENCES:]
    plans = around[:, :, :1]
    planner, means = deciding(path, model, AGENT, 3), first_means(AGENT.planner, 100, ACTION)
    first = planner.decide(pool.observations[:100], means, range(100)).means
    rest = planner.decide(pool.observations[100:], means[:, :50], range(100, 150)).means
    torch.testing.assert_close(torch.cat([first, rest], 1), plans[:, :, 0])
    distances = (around - plans).abs().mean((0, 1, 3))
    assert distances[0] == 0 and (distances[1:].diff() > -0.02).all() and distances[-1] > 0.2
    assert around.abs().max() <= 1
    assert torch.equal(add_plans(pool, model, AGENT, path, seed=3).actions, more.actions)


def test_scores_are_what_the_planner_compares(model):
    pool = draw_pool(model, replay_with(60), HORIZON, 30)
    teaching = Teaching.of(model, pool, torch.arange(AGENT.network.latent_width), DISCOUNT)
    actions = pool.actions[:, 4:5]
    z = model.encode(pool.observations[4]).expand(1, SEQUENCES, -1)
    score, discount = 0.0, 1.0
    with torch.no_grad():
        for action in actions:
            score = score + discount * model.predict_reward(z, action)
            z, discount = model.next_latent(z, action), discount * DISCOUNT
        for member, value in enumerate(model.q_values(z, model.act(z))):
            whole = (score + discount * value)[0]
            torch.testing.assert_close(teaching.scores[member, 4], whole - whole.mean())
        other = WorldModel(model.widths, torch.Generator().manual_seed(5))
        starts = torch.arange(30)
        assert teaching.error(other, starts) > 1.1 * teaching.error(other, starts, scored=False)


def test_a_distillation_that_diverges_changes_nothing(model):
    whole, student, _, _, pool, latents, _ = cut(model, 0.3)
    teacher = Teacher(whole, lambda _: pool, latents, AGENT, PATH)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(NonFiniteLoss, match="distillation loss"):
        distil(student, teacher, steps=50, rate=1e20)
    assert all(torch.equal(before[n], t) for n, t in student.state_dict().items())


def test_a_student_of_a_whole_agent_has_no_error(model):
    pool = draw_pool(model, replay_with(60), HORIZON, 30)
    teaching = Teaching.of(model, pool, torch.arange(AGENT.network.latent_width), DISCOUNT)
    with torch.no_grad():
        assert float(teaching.error(model, torch.arange(30))) < 1e-8
    latents = roll_out(model, pool.observations, pool.actions)
    torch.testing.assert_close(teaching.latents, latents)
