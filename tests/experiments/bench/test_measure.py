"""Clouds to measure on, and times in turn."""

import numpy as np

from experiments.bench import (
    measure,
)


def test_rows_have_medians_between_quartiles_and_run_in_turn():
    calls = []
    cases = [measure.Case({"what": what}, lambda what=what: calls.append(what)) for what in "ab"]
    rows = measure.in_turn(cases, repeats=5)
    assert [row["what"] for row in rows] == ["a", "b"]
    assert all(row["q1"] <= row["ms"] <= row["q3"] for row in rows)
    assert calls == ["a", "b"] * 6  # the first round does not count
    assert measure.ratios(rows)[0]["ratio"] == 1


def test_a_confused_student_has_other_masses_than_its_teacher():
    x, y, labels = measure.clouds("confused", 200, 32, classes=4)
    centres = np.stack([y[labels == c].mean(0) for c in range(4)])
    nearest = [((z[:, None] - centres) ** 2).sum(-1).argmin(1) for z in (x, y)]
    assert (nearest[1] == labels).all()
    assert np.bincount(nearest[0])[0] == 60 and (nearest[0] != labels).sum() == 10
