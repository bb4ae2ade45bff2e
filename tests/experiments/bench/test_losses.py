"""The rows of classes and gaussian, and the peer by eigendecompositions."""

import jax
import numpy as np
import pytest

from experiments.bench import (
    answers,
    measure,
)
from experiments.bench import losses as loss_suites


@pytest.mark.parametrize(("n", "d"), [(16, 40), (64, 6)])
def test_the_eigh_peer_has_the_value_and_the_gradient(n, d):
    x, y, _ = measure.clouds("related", n, d)
    value, grad = jax.value_and_grad(loss_suites.eigh_gaussian_w2)(x, y)
    assert float(value) == pytest.approx(answers.textbook_gaussian_w2(x, y), rel=1e-3)
    direction = np.random.default_rng(0).normal(size=x.shape)
    forms = [answers.textbook_gaussian_w2(x + h * direction, y) for h in (1e-3, -1e-3)]
    assert float((grad * direction).sum()) == pytest.approx((forms[0] - forms[1]) / 2e-3, rel=2e-2)


@pytest.mark.slow
def test_classes_and_gaussian_rows(tmp_path):
    rows, notes = loss_suites.classes(tmp_path, counts=(3,), n=12, d=4, repeats=1)
    assert len(rows) == 3 and all("target at most 1.5" in note for note in notes)
    assert min(row["ratio"] for row in rows) == 1
    assert [row["answer"] for row in rows] == ["right"] * 3
    shapes = ((16, 4), (8, 12))
    rows, notes = loss_suites.gaussian(tmp_path, shapes, polar_sizes=(8,), repeats=1)
    assert {"gaussian_w2", "n x n, SVD", "polar, SVD"} < {row["what"] for row in rows}
    assert {row["answer"] for row in rows if row["what"] == "gaussian_w2"} == {"right"}
    assert len(notes) == 1 and "n = 8, d = 12" in notes[0] and "at least 10" in notes[0]
