"""Sensitivity: what is removed, and correlations whose answer is known."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tdmpc_prune.analysis import sensitivity
from tdmpc_prune.analysis.sensitivity import RANDOM, RANKED, Loss, Removal
from tdmpc_prune.analysis.subject import Score
from tests.commands import run


@given(
    width=st.integers(2, 40),
    fractions=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5, unique=True).map(sorted),
)
def test_pieces_remove_every_unit_once_and_fractions_are_nested(width, fractions):
    wanted = sensitivity.removals(["g"], fractions)
    ranked = [r for r in wanted if r.order == RANKED]
    assert [(r.start, r.stop) for r in ranked] == [(0.0, fraction) for fraction in fractions]
    first = fractions[0]
    pieces = [r for r in wanted if r.order == RANDOM and (r.start > 0 or r.stop == first)]
    taken = [i for r in pieces for i in range(round(r.start * width), round(r.stop * width))]
    assert sorted(taken) == list(range(width))


def losses_of(groups: np.ndarray, importance: np.ndarray) -> list[Loss]:
    """Two pieces per group, `[G, 2]` lost scores and importances."""
    found = []
    for g, (lost, known) in enumerate(zip(groups, importance, strict=True)):
        for piece, (start, stop) in enumerate(((0.0, 0.5), (0.5, 1.0))):
            removal = Removal(f"g{g}", RANDOM, start, stop)
            own = {"good": float(known[piece]), "bad": -float(known[piece])}
            found.append(Loss(removal, 3, Score(0.0, 0.0), float(lost[piece]), own))
    return found


def test_a_metric_that_knows_the_losses_correlates_fully():
    lost = np.array([[1.0, 2.0], [5.0, 3.0], [9.0, 11.0], [20.0, 12.0]])
    found = losses_of(lost, lost**3)
    for metric, rho in (("good", 1.0), ("bad", -1.0)):
        correlations = sensitivity.correlate(found, metric)
        assert set(correlations) == set(sensitivity.LEVELS)
        for correlation in correlations.values():
            assert correlation.rho == pytest.approx(rho)
            # A resampling may draw one group alone, whose mean correlates with nothing.
            assert min(abs(correlation.low), abs(correlation.high)) == pytest.approx(1, abs=0.4)


def test_within_their_group_the_groups_do_not_matter():
    """Importance that knows the groups, and has the order inside each of them upside down."""
    lost = np.array([[1.0, 2.0], [11.0, 12.0], [101.0, 102.0]])
    correlations = sensitivity.correlate(losses_of(lost, lost[:, ::-1]), "good")
    assert correlations["groups"].rho == pytest.approx(1.0)
    assert correlations["pieces"].rho > 0.7
    assert correlations["pieces within their group"].rho == pytest.approx(-1.0)


@pytest.mark.parametrize("lost", [[[1, 1], [2, 5], [2, 3]], [[4, 4], [4, 4], [4, 4]]])
def test_the_correlation_is_spearmans(lost):
    """With ties, and 0 where there is nothing to rank."""
    lost, good = np.array(lost, float), np.array([[3.0, 1.0], [2.0, 2.0], [7.0, 9.0]])
    found = sensitivity.correlate(losses_of(lost, good), "good")["pieces"]
    constant = np.ptp(lost) == 0
    expected = 0.0 if constant else spearmanr(good.ravel(), lost.ravel()).statistic
    assert found.rho == pytest.approx(expected)
    assert (found.low, found.high) == (0, 0) if constant else found.low < found.rho < found.high


@pytest.mark.parametrize(  # half a minute for an agent
    "kind", ["autoencoder", pytest.param("agent", marks=pytest.mark.slow)]
)
def test_as_typed(trained, tmp_path, kind):
    arguments = [f"checkpoint={trained / kind}", "fractions=[0.5]", "episodes=1", "out=s"]
    arguments += ["prune.gather_updates=3", f"processes={2 if kind == 'agent' else 1}"]
    if kind == "agent":  # one group of every component; the autoencoder's are all measured
        own = "dynamics.0,reward.0,policy.0,q_ensemble.0.0"
        arguments.append(f"groups=[encoder.0,'encoder.2+dynamics.4',{own}]")
    done = run("sensitivity.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.md", "s.png"]
    values = json.loads((tmp_path / "s.json").read_text())
    assert set(values["correlations"]) >= {"bayesian", "magnitude", "random"}
    groups = {loss["removal"]["group"] for loss in values["losses"]}
    assert len(values["losses"]) == 3 * len(groups)  # ranked half, and two random halves
    assert len(values["coupling"]) == 1 and set(values["coupling"]) < groups
    before = values["before"]["mean"]
    for loss in values["losses"]:
        assert loss["units"] >= 1
        assert loss["lost"] == pytest.approx(before - loss["score"]["mean"])
    if kind == "autoencoder":  # which has learnt something that can be lost
        assert np.mean([loss["lost"] for loss in values["losses"]]) > 0
    assert "(coupling)" not in done.stdout and "| coupling" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "'nowhere' does not exist"),
        (["checkpoint=.", "fractions=[0.5,0.2]"], "fractions=[0.5, 0.2] must ascend"),
        (["checkpoint=.", "fractions=[]"], "must ascend between 0 and 1"),
        (["checkpoint=.", "processes=0"], "processes=0 must be at least 1"),
        (["checkpoint=.", "groups=[a,a]"], "repeats one"),
        (["checkpoint=.", "out=nowhere/x"], "out=nowhere/x cannot be written"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, arguments, message):
    done = run("sensitivity.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr


def test_two_groups_are_measured_and_not_correlated(trained, tmp_path):
    arguments = ["groups=[encoder.0,decoder.0]", "fractions=[0.5]", "processes=1", "out=s"]
    arguments += [f"checkpoint={trained / 'autoencoder'}", "prune.gather_updates=3"]
    done = run("sensitivity.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Too few groups to correlate" in done.stdout
    values = json.loads((tmp_path / "s.json").read_text())
    assert values["correlations"] == {} and len(values["losses"]) == 6


def test_an_unknown_group_is_named(trained, tmp_path):
    done = run(
        "sensitivity.py", f"checkpoint={trained / 'autoencoder'}", "groups=[x]", cwd=tmp_path
    )
    assert done.returncode == 2 and "groups: there is no 'x'; there are encoder.0" in done.stderr
