"""The replay buffer: priorities, ring, episode ends; properties over random histories."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tdmpc_prune.agent.replay import Episode, SequenceReplay, SumTree


def make_replay(capacity=64, horizon=3, exponent=0.6, correction=0.4):
    return SequenceReplay(capacity, 1, 1, horizon, exponent, correction)


def make_episode(first, length, terminated):
    """An episode whose every number tells which decision it belongs to."""
    steps = np.arange(first, first + length + 1, dtype=np.float32)
    return Episode(steps[:, None], steps[:-1, None], steps[:-1], terminated)


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=70).filter(lambda w: sum(w) > 1e-3),
    fractions=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20),
)
def test_sum_tree_finds_where_the_running_sum_exceeds_a_mass(weights, fractions):
    tree = SumTree()
    tree[np.arange(len(weights))] = np.array(weights)
    assert tree.total == pytest.approx(sum(weights))
    mass = np.array(fractions) * tree.total
    found = tree.find(mass)
    sums = np.concatenate([[0], np.cumsum(weights)])
    assert (np.array(weights)[found] > 0).all()
    assert (sums[found] <= mass + 1e-9).all()
    assert (mass <= sums[found + 1] + 1e-9).all()


@given(
    st.lists(
        st.dictionaries(st.integers(0, 300), st.floats(0, 10), min_size=1), min_size=1, max_size=6
    )
)
@example([{0: 1.0}, {300: 2.0}])  # what lies between has never had a weight
def test_a_sum_tree_that_grew_is_the_one_that_was_filled_at_once(parts):
    grown, whole = SumTree(), SumTree()
    for part in parts:
        grown[np.array(list(part))] = np.array(list(part.values()))
    weights = {place: weight for part in parts for place, weight in part.items()}
    places, expected = np.array(list(weights)), np.array(list(weights.values()))
    whole[places] = expected
    assert grown.total == whole.total
    assert (grown[places] == expected).all()
    if whole.total > 0:
        mass = np.linspace(0, 1, 30, endpoint=False) * whole.total
        assert (grown.find(mass) == whole.find(mass)).all()


def test_sum_tree_repeated_places_take_one_weight():
    tree = SumTree()
    tree[np.array([3, 1, 3])] = np.array([2.0, 1.0, 2.0])
    assert tree.total == 3


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=12),
    capacity=st.integers(7, 40),
    horizon=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_samples_are_what_happened(lengths, capacity, horizon, seed):
    """Whatever the lengths, ends and wraps: sequences are contiguous, real, and masked right."""
    replay = make_replay(capacity, horizon)
    first, ends, terminal = 0, {}, set()
    for length, terminated in lengths:
        replay.add(make_episode(first, length, terminated))
        for step in range(first, first + length):
            ends[step] = first + length
        if terminated:
            terminal.add(first + length - 1)
        first += length + 1  # the last observation takes a number, too
    rng = np.random.default_rng(seed)
    batch, starts = replay.sample(16, rng)
    stored = sorted(ends)[-min(len(ends), capacity) :]
    for b in range(16):
        step = int(batch.observation[b, 0])
        assert step in stored
        assert int(replay._observations[starts[b], 0]) == step
        for t in range(horizon):
            inside = step + t < ends[step]
            assert batch.valid[t, b] == inside
            if inside:
                assert batch.actions[t, b, 0] == step + t
                assert batch.rewards[t, b] == step + t
                assert batch.next_observations[t, b, 0] == step + t + 1
                assert batch.terminated[t, b] == (step + t in terminal)


def starts_of(replay):
    """Every place that is ever drawn, by the number of its decision."""
    batch, _ = replay.sample(4000, np.random.default_rng(0))
    return sorted({int(step) for step in batch.observation[:, 0]})


def test_the_last_decisions_of_an_episode_cut_off_by_time_start_nothing():
    replay = make_replay(horizon=3)
    replay.add(make_episode(0, 10, terminated=False))
    assert starts_of(replay) == list(range(7))


def test_every_decision_of_a_terminated_episode_may_start():
    replay = make_replay(horizon=3)
    replay.add(make_episode(0, 10, terminated=True))
    assert starts_of(replay) == list(range(10))


def test_every_decision_of_a_short_episode_may_start():
    replay = make_replay(horizon=3)
    replay.add(make_episode(0, 2, terminated=False))
    assert starts_of(replay) == [0, 1]


def test_sampling_follows_priority_to_the_exponent():
    replay = make_replay(horizon=1, exponent=0.5, correction=1.0)
    replay.add(make_episode(0, 4, terminated=True))
    replay.set_priorities(np.arange(4), np.array([1.0, 4.0, 9.0, 16.0]))
    batch, starts = replay.sample(40_000, np.random.default_rng(0))
    frequencies = np.bincount(starts, minlength=4) / len(starts)
    np.testing.assert_allclose(frequencies, [0.1, 0.2, 0.3, 0.4], atol=0.01)
    weights = batch.weights.numpy()
    for start, weight in enumerate([1, 1 / 2, 1 / 3, 1 / 4]):
        np.testing.assert_allclose(weights[starts == start], weight, rtol=1e-5)


def test_new_episodes_get_the_largest_priority():
    replay = make_replay(horizon=1)
    replay.add(make_episode(0, 3, terminated=True))
    replay.set_priorities(np.arange(3), np.array([0.5, 7.0, 0.1]))
    replay.add(make_episode(10, 2, terminated=True))
    np.testing.assert_allclose(replay._priorities[3:5], 7.0, rtol=1e-5)


def test_an_empty_buffer_says_so():
    with pytest.raises(ValueError, match="empty"):
        make_replay().sample(1, np.random.default_rng(0))


@pytest.mark.parametrize("decisions", [20, 64, 150])
def test_state_goes_on_exactly(decisions):
    replay, rng = make_replay(64), np.random.default_rng(1)
    for first in range(0, decisions, 10):
        replay.add(make_episode(first * 2, 10, terminated=first % 20 == 0))
        _, starts = replay.sample(8, rng)
        replay.set_priorities(starts, rng.random(8))
    copy = make_replay(64)
    copy.load_state(replay.state())
    for again in (replay, copy):
        again.add(make_episode(5000, 10, terminated=False))
    ours, our_starts = replay.sample(32, np.random.default_rng(2))
    theirs, their_starts = copy.sample(32, np.random.default_rng(2))
    assert (our_starts == their_starts).all()
    assert all((value == getattr(theirs, name)).all() for name, value in vars(ours).items())
