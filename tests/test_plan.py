"""Plans and schedules: allocation, floors, budgets, protection, files, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc_prune.errors import UserError
from tdmpc_prune.pruning.allocation import _chunk_cost, make_plan
from tdmpc_prune.pruning.config import ALLOCATIONS, PruneConfig
from tdmpc_prune.pruning.groups import find_groups
from tdmpc_prune.pruning.plan import Plan
from tdmpc_prune.pruning.schedule import Schedule, make_schedule
from tdmpc_prune.pruning.surgery import commit
from tests.test_groups import LATENT, small_learner

LEARNER, TIES = small_learner(
    latent=24, encoder=(40,), dynamics=(48, 48), reward=(48, 40), policy=(48, 48)
)
STRUCTURE = find_groups(TIES)
DENSE = STRUCTURE.parameters()
UNITS = sum(STRUCTURE.widths.values())
CONFIG = PruneConfig(method="bayesian", min_width=4, round_to=4)


def densities(seed=0):
    return np.random.default_rng(seed).gamma(1.0, size=UNITS)


def removed_densities(plan, values):
    offset, found = 0, []
    for name, width in STRUCTURE.widths.items():
        found += values[offset : offset + width][plan.removed.get(name, [])].tolist()
        offset += width
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    sparsity=st.floats(0.05, 0.75),  # what the highest floors allow
    allocation=st.sampled_from(ALLOCATIONS),
    round_to=st.sampled_from([1, 2, 4, 8]),
    min_width=st.integers(1, 9),
)
def test_plans_reach_the_sparsity_within_their_limits(
    seed, sparsity, allocation, round_to, min_width
):
    config = replace(CONFIG, allocation=allocation, round_to=round_to, min_width=min_width)
    plan = make_plan(STRUCTURE, densities(seed), config, sparsity, DENSE)
    assert sparsity <= plan.achieved < sparsity + 0.2
    for name, width in plan.widths_after.items():
        before = STRUCTURE.widths[name]
        assert width == before or (width % round_to == 0 and width >= min_width)
    offset = 0
    for name, width in STRUCTURE.widths.items():  # the least important of each group go
        own = densities(seed)[offset : offset + width]
        gone = plan.removed.get(name, [])
        if gone:
            assert own[gone].max() <= np.delete(own, gone).min()
        offset += width


def test_global_allocation_cuts_where_it_matters_least():
    values, offset = 0.5 + np.random.default_rng(0).random(UNITS), 0
    for name, width in STRUCTURE.widths.items():
        values[offset : offset + width] *= 1e-3 if name.startswith("reward") else 1
        offset += width
    plan = make_plan(STRUCTURE, values, replace(CONFIG, round_to=1), 0.1, DENSE)
    assert set(plan.removed) == {"reward.0", "reward.2"}
    uniform = make_plan(STRUCTURE, values, replace(CONFIG, allocation="uniform"), 0.4, DENSE)
    shares = [len(uniform.removed.get(n, [])) / w for n, w in STRUCTURE.widths.items() if w >= 24]
    assert max(shares) - min(shares) < 0.15


def test_balanced_allocation_begins_like_global_and_empties_a_group_last():
    values, offset = 0.5 + np.random.default_rng(0).random(UNITS), 0
    for name, width in STRUCTURE.widths.items():
        values[offset : offset + width] *= 0.1 if name.startswith("reward") else 1
        offset += width
    plans = {
        (allocation, sparsity): make_plan(
            STRUCTURE,
            values,
            replace(CONFIG, allocation=allocation, round_to=1, min_width=1),
            sparsity,
            DENSE,
        )
        for allocation in ("global", "balanced")
        for sparsity in (0.02, 0.8)
    }
    for allocation in ("global", "balanced"):
        assert set(plans[allocation, 0.02].removed) == {"reward.0", "reward.2"}
    assert plans["global", 0.8].widths_after["reward.0"] == 1
    after = plans["balanced", 0.8].widths_after
    assert 2 < after["reward.0"] < min(after["dynamics.0"], after["policy.0"])


def test_cost_of_a_chunk_by_hand():
    """Importance 1, 2, 3, 4: after the first chunk of two, 7 of 10 are left; after all, nothing."""
    own = np.array([1.0, 2.0, 3.0, 4.0])
    assert _chunk_cost(own, 0, 2, balanced=False) == 1.5
    assert _chunk_cost(own, 0, 2, balanced=True) == pytest.approx(1.5 / 0.7)
    assert _chunk_cost(own, 2, 1, balanced=True) == pytest.approx(3 / 0.4)
    assert _chunk_cost(own, 3, 1, balanced=True) == np.inf
    assert _chunk_cost(np.zeros(3), 0, 1, balanced=True) == 0


def test_floors_protection_and_budgets():
    config = replace(CONFIG, min_widths={"coupling": 20, "dynamics": 16, "reward.0": 32})
    after = make_plan(STRUCTURE, densities(), config, 0.5, DENSE).widths_after
    assert after[LATENT] >= 20 and after["reward.0"] >= 32
    assert after["dynamics.0"] >= 16 and after["dynamics.2"] >= 16

    config = replace(CONFIG, protect=["coupling", "policy.2"])
    plan = make_plan(STRUCTURE, densities(), config, 0.5, DENSE)
    assert LATENT not in plan.removed and "policy.2" not in plan.removed
    config = replace(CONFIG, protect=["encoder"])  # with what it writes, the latent
    plan = make_plan(STRUCTURE, densities(), config, 0.5, DENSE)
    assert not {"encoder.0", LATENT} & set(plan.removed)

    config = replace(CONFIG, budgets={"dynamics": 0.3, "q_ensemble": 0.1})
    plan = make_plan(STRUCTURE, densities(), config, 0.4, DENSE)
    before, after = plan.parameters["dynamics"]
    assert 0.7 * before <= after < before
    pairs = [pair for name, pair in plan.parameters.items() if name.startswith("q_ensemble")]
    assert sum(after for _, after in pairs) >= 0.9 * sum(before for before, _ in pairs)


@pytest.mark.parametrize(
    ("changes", "sparsity", "message"),
    [
        ({"min_width": 40, "round_to": 1}, 0.9,
         r"binding floors: encoder\.2\+dynamics\.4 ≥ 24, dynamics\.0 ≥ 40"),
        ({"protect": ["dynamics"]}, 0.95, r"dynamics\.0 ≥ 48"),
        ({"budgets": {"dynamics": 0.1, "reward": 0.1, "policy": 0.1}}, 0.9, "budgets"),
        ({"protect": ["coupling", "encoder", "dynamics", "reward", "policy", "q_ensemble"]}, 0.1,
         "leaves nothing that may be cut"),
        ({"protect": ["enc"]}, 0.1, "there is no 'enc'; there are encoder, dynamics"),
        ({"min_widths": {"latnt": 3}}, 0.1, "min_widths: there is no 'latnt'"),
        ({"budgets": {"coupling": 0.1}}, 0.1, "budgets: there is no 'coupling'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(changes, sparsity, message):
    with pytest.raises(UserError, match=message) as error:
        make_plan(STRUCTURE, densities(), replace(CONFIG, **changes), sparsity, DENSE)
    assert "\n" not in str(error.value)


def test_a_plan_prints_saves_and_can_be_replayed(tmp_path):
    plan = make_plan(STRUCTURE, densities(), CONFIG, 0.5, DENSE)
    path = tmp_path / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    text = plan.explain()
    (row,) = [line for line in text.splitlines() if line.startswith("| all ")]
    before, after = sum(DENSE.values()), sum(after for _, after in plan.parameters.values())
    assert f"{before} → {after}" in row
    assert f"{sum(STRUCTURE.macs().values())} → " in row
    for name in (*DENSE, "coupling"):
        assert f"| {name} " in text

    learner, ties = small_learner(
        latent=24, encoder=(40,), dynamics=(48, 48), reward=(48, 40), policy=(48, 48)
    )
    left = commit(again, find_groups(ties), ties)
    assert left.widths == plan.widths_after
    assert sum(p.numel() for p in learner.model.parameters()) == after
    with pytest.raises(UserError, match="the plan does not fit: group 'encoder"):
        commit(again, left, ties)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v.pop("widths"), "'widths' is missing or unknown"),
        (lambda v: v.update(format="x"), "is no plan of this package"),
        (lambda v: v.update(more=1), "'more' is missing or unknown"),
    ],
)
def test_damaged_plans_are_refused(tmp_path, damage, message):
    path = tmp_path / "plan.json"
    make_plan(STRUCTURE, densities(), CONFIG, 0.5, DENSE).save(path)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        Plan.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Plan.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        Plan.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize("shape", ["cosine", "linear", "cubic"])
def test_schedules_rise_from_nothing_to_the_final_sparsity(shape):
    schedule = make_schedule(
        PruneConfig(shape=shape, start=0.2, end=30_000, steps=5), 0, 50_000, "env_steps"
    )
    assert (schedule.start, schedule.end) == (10_000, 30_000)
    assert [schedule.time_of(step) for step in (1, 5)] == [14_000, 30_000]
    sparsities = [schedule.sparsity_after(step) for step in range(6)]
    assert sparsities[0] == 0 and sparsities[-1] == pytest.approx(0.9)
    assert (np.diff(sparsities) > 0).all()
    if shape == "cosine":  # METHOD.md, section 4
        assert sparsities[2] == pytest.approx(0.9 * 0.5 * (1 - np.cos(np.pi * 0.4)))
    assert schedule.end_of(1, 14_000, 50_000) == 18_000
    assert schedule.end_of(5, 30_000, 32_000) == 32_000
    assert schedule.end_of(1, 19_000, 50_000) == 23_000  # a late cut gets its time, too
    assert [schedule.progress(t) for t in (0, 10_000, 20_000, 60_000)] == [0, 0, 0.5, 1]


def test_schedules_of_a_run_that_starts_later_count_from_there():
    schedule = make_schedule(PruneConfig(start=0.0, end=0.5), 50_000, 70_000, "env_steps")
    assert (schedule.start, schedule.end) == (50_000, 60_000)
    once = make_schedule(PruneConfig(start=0.0, end=0.6, steps=1), 50_000, 50_000, "env_steps")
    assert once == Schedule(50_000, 50_000, 1, 0.9, "cosine")
    assert once.progress(50_000) == 1 and once.end_of(1, 50_000, 50_000) == 50_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": 60_000}, "ends at 60000 env steps, after the run, which ends at 50000"),
        ({"start": 0.8, "end": 0.5}, r"prune.end=0.5 lies before prune.start=0.8"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_schedule(PruneConfig(**changes), 0, 50_000, "env_steps")


def test_without_strictness_a_plan_goes_as_far_as_it_may():
    config = replace(CONFIG, budgets={"dynamics": 0.1, "reward": 0.1, "policy": 0.1})
    plan = make_plan(STRUCTURE, densities(), config, 0.9, DENSE, strict=False)
    assert 0 < plan.achieved < 0.9
    nothing = replace(CONFIG, protect=list(DENSE))
    assert make_plan(STRUCTURE, densities(), nothing, 0.9, DENSE, strict=False).removed == {}


def test_importance_that_is_no_number_is_refused():
    values = densities()
    values[3] = np.nan
    with pytest.raises(ValueError, match="not a finite number"):
        make_plan(STRUCTURE, values, CONFIG, 0.5, DENSE)


def test_budgets_are_for_global_allocation():
    with pytest.raises(UserError, match=r"needs prune\.allocation"):
        PruneConfig(allocation="uniform", budgets={"dynamics": 0.5})
