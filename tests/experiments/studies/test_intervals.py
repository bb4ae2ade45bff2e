"""A table's statistics against numbers worked out by hand, and against SciPy."""

import numpy as np
import pytest
from scipy import stats

from experiments.studies import intervals


def test_a_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, sd 1, so t = 2 sqrt(3) with 2 degrees of freedom, where the
    # quantile is 4.3027 and p = 1 - t / sqrt(2 + t^2) = 1 - sqrt(12 / 14).
    found = intervals.paired([91.0, 93.0, 95.0], [90.0, 91.0, 92.0])
    assert found["mean"] == pytest.approx(2)
    assert found["sd"] == pytest.approx(1)
    half = 4.30265273 / np.sqrt(3)
    np.testing.assert_allclose(found["interval"], [2 - half, 2 + half], rtol=1e-8)
    assert found["p"] == pytest.approx(1 - np.sqrt(12 / 14))
    assert intervals.verdict(found) == 0  # p = 0.074


def test_it_is_scipys_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7))
    expected = stats.ttest_rel(a, b)
    found = intervals.paired(a, b)
    assert found["p"] == pytest.approx(expected.pvalue)
    np.testing.assert_allclose(found["interval"], expected.confidence_interval(0.95))


def test_pairing_is_by_seed_and_not_by_mean():
    """Seeds that differ much, a difference that does not: only the pairs show it."""
    alone, gain = np.array([80.0, 85.0, 90.0, 95.0]), np.array([1.0, 1.1, 0.9, 1.0])
    assert intervals.verdict(intervals.paired(alone + gain, alone)) == 1
    assert intervals.verdict(intervals.paired(alone - gain, alone)) == -1


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0]])
def test_no_spread_no_interval(values):
    """One seed, or the same difference in each: a zero would pretend to certainty."""
    found = intervals.paired(np.array(values) + 0.3, values)
    assert found["mean"] == pytest.approx(0.3)
    assert found["interval"] is None and found["p"] is None
    assert intervals.verdict(found) == 0


def test_holms_adjustment_by_hand():
    # In order 0.01 x 4, 0.02 x 3, 0.03 x 2 = 0.06, 0.04 x 1 -> at least the one before: 0.06.
    assert intervals.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert intervals.holm([0.9, 0.6]) == [1.0, 1.0]
    assert intervals.holm([0.01, None]) == [0.02, None]  # what is unknown counts as compared


def test_a_difference_that_adjustment_takes_away():
    alone = [90.0, 91.0, 92.0, 93.0, 94.0]
    better = np.add(alone, [1.0, 0.2, 1.1, 0.3, 0.9]).tolist()
    noise = [np.add(alone, d).tolist() for d in ([1, -1, 0, 1, -1], [0, 1, -1, -1, 1])]
    found = intervals.compare({"a": better, "b": noise[0], "c": noise[1]}, alone)
    one = intervals.compare({"a": better}, alone)
    assert one["a"]["p_holm"] == one["a"]["p"] == found["a"]["p"]
    assert found["a"]["p_holm"] == pytest.approx(3 * found["a"]["p"])
    assert [intervals.verdict(found["a"], p) for p in ("p", "p_holm")] == [1, 0]


def test_a_run_that_diverged_is_left_out_with_its_pair():
    values, reference = [1.0, None, 3.0, 4.0, 6.0], [0.0, 5.0, 1.0, None, 3.0]
    left = [1.0, 3.0, 6.0], [0.0, 1.0, 3.0]
    assert intervals.paired(values, reference) == intervals.paired(*left)
    assert intervals.summary(values) == intervals.summary([1.0, 3.0, 4.0, 6.0])
    nothing = intervals.paired([None, None], [1.0, 2.0])
    assert nothing == {"mean": None, "sd": None, "interval": None, "p": None}
    assert intervals.verdict(nothing) == 0
    assert intervals.compare({"a": [None], "b": [2.0]}, [1.0])["b"]["mean"] == 1
