"""Growth with n and d, each point in a process of its own."""

import sys

import pytest

from experiments.bench import (
    growth,
)


@pytest.mark.slow
def test_growth_measures_a_point_in_a_process_of_its_own():
    row = growth._point("w2", 1024, 8, repeats=1)  # megabytes, so that the peak can be seen
    assert (row["n"], row["d"]) == (1024, 8) and row["ms"] > 0 and row["answer"] == "right"
    if sys.platform == "linux":
        assert 0 < row["peak MiB"] < 500


def test_growth_fits_exponents(monkeypatch, tmp_path):
    def cubic(metric, n, d, repeats):
        sizes = {"peak MiB": n**2 / d, "n x n arrays": n / 32}
        return {"metric": metric, "n": n, "d": d, "ms": 1e-6 * n**3 * d, **sizes}

    monkeypatch.setattr(growth, "_point", cubic)
    rows, notes = growth.growth(tmp_path, sizes=(64, 128), features=(4, 8, 16))
    assert len(rows) == 4 * (2 + 2)
    assert "w2: time ~ n^3.0, memory ~ n^2.0, time ~ d^1.0, memory ~ d^-1.0" in notes
    assert notes[-1] == "w2, n = 128: peak in n x n arrays: 4.00, target at most 4: met"
    assert {path.name for path in tmp_path.iterdir()} == {"growth-n.png", "growth-d.png"}
