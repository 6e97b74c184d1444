"""Ranks and their correlation against SciPy's."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from tdmpc_prune.pruning.ranks import ranks, spearman


@pytest.mark.parametrize("values", [[], [3.0], [2, 1, 2, 5, 2, 1], [np.nan, 4, np.nan, 4, -1]])
def test_ranks(values):
    values = np.array(values, float)
    np.testing.assert_array_equal(ranks(values), rankdata(values, nan_policy="omit"))


def test_correlation_of_ranks():
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.integers(0, 9, (2, 30)) / 7
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    assert spearman(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
