"""Growth with n, d and classes, each point in a process of its own."""

import sys

import pytest

from experiments.bench import growth


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["w2", "nst"])
def test_growth_measures_a_point_in_a_process_of_its_own(metric):
    row = growth._point(metric, 1024, 16, 10, repeats=1)  # megabytes, so that the peak can be seen
    assert (row["n"], row["d"], row["classes"]) == (1024, 16, 10) and row["ms"] > 0
    assert row.get("answer", "right") == "right"
    if sys.platform == "linux":
        assert 0 < row["peak MiB"] < 500


def test_growth_fits_exponents_and_ends_where_it_takes_long(monkeypatch, tmp_path):
    def cubic(metric, n, d, classes, repeats):
        sizes = {"peak MiB": n**2 / d, "n x n arrays": n / 32}
        ms = 1e-6 * n**3 * d * classes**0.5
        return {"metric": metric, "n": n, "d": d, "classes": classes, "ms": ms, **sizes}

    monkeypatch.setattr(growth, "_point", cubic)
    rows, notes = growth.growth(
        tmp_path, metrics=("w2", "kd"), sizes=(64, 128, 4096, 8192), features=(4, 8, 16),
        classes=(4, 16),
    )  # fmt: skip
    assert len(rows) == 2 * (3 + 2 + 1)  # 8,192 is left out, and no point is measured twice
    assert notes[0] == (
        "w2: time ~ n^3.0, memory ~ n^2.0, time ~ d^1.0, memory ~ d^-1.0, "
        "time ~ classes^0.5, memory ~ classes^0.0"
    )
    assert notes[-1] == "w2, n = 4096: peak in n x n arrays: 128.00, target at most 4: MISSED"
    assert {path.name for path in tmp_path.iterdir()} == {"growth-n.png", "growth-d.png"}
