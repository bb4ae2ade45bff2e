"""Procrustes, Gram matrices and CKA against their float64 textbook forms, and at their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check, compiled
from clouds import KINDS, draw
from draws import single
from reference import geometry

from kd2m_jax import losses

slow = pytest.mark.slow
LOSSES = {
    losses.procrustes: geometry.procrustes,
    losses.gram: geometry.gram,
    losses.cka: geometry.cka,
}
functions = pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
# Samples, and features of both: fewer samples than features, more, and unequal sizes.
SHAPES = [(30, 8, 12), *(pytest.param(*s, marks=slow) for s in ((12, 40, 40), (24, 40, 9)))]


def pair(kind, n, d, e, seed=0):
    """Clouds of the same examples, of n rows each, the second one turned and with e features."""
    x, y, _ = draw(kind, n, max(d, e), classes=3, seed=seed)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(max(d, e),) * 2))[0]
    return x[:, :d], (y @ turn)[:, :e]


@functions
@pytest.mark.parametrize(("n", "d", "e"), SHAPES)
def test_values_and_gradients(function, n, d, e):
    for kind in KINDS:
        check(function, LOSSES[function], *pair(kind, n, d, e))


@pytest.mark.parametrize(
    ("function", "n", "d"),
    [
        (losses.gram, 30, 8),
        *(pytest.param(f, *s, marks=slow) for f in LOSSES for s in ((40, 8), (8, 40))),
    ],
)
@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_near_a_rotation_of_the_same_features(function, n, d, step):
    """The formulas cancel there: in float32 `gram` was off by 10% at 1e-3, and 1e-4 was noise."""
    y = draw("gaussian", n, d)[0]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0]
    x = (y + step * np.random.default_rng(2).normal(size=(n, d))) @ turn
    x, y = (a.astype(np.float32).astype(np.float64) for a in (x, y))
    value, (gradient, _) = compiled(function)(*single(x, y))
    np.testing.assert_allclose(value, LOSSES[function](x, y), rtol=1e-2)
    slope = (np.asarray(gradient, np.float64) * (x - y @ turn)).sum()
    np.testing.assert_allclose(slope, 2 * value, rtol=0.05)  # the value is quadratic there


@slow
@functions
def test_neither_cloud_may_not_be_turned_mirrored_or_moved(function):
    x, y = pair("clustered", 30, 8, 8)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    turn[:, 0] *= -np.sign(np.linalg.det(turn))  # a reflection
    value = function(*single(x, y))
    for a, b in ((x @ turn + 5, y), (x, y @ turn.T - 3), (x, np.pad(y @ turn, ((0, 0), (0, 4))))):
        np.testing.assert_allclose(function(*single(a, b)), value, rtol=1e-4)
    np.testing.assert_allclose(function(*single(x, x @ turn + 1)), 0, atol=1e-6 * float(value))


@slow
def test_procrustes_is_at_most_l2_and_gaussian_w2_at_most_both():
    """Turning features is free in the one, and pairing examples in the other."""
    for kind in KINDS:
        x, y, _ = draw(kind, 30, 8)
        x, y = single(x - x.mean(0), y - y.mean(0))
        bound = losses.l2(x, y)
        assert losses.procrustes(x, y) <= bound * (1 + 1e-5)
        assert losses.gaussian_w2(x, y) <= bound * (1 + 1e-5)


@slow
def test_cka_is_half_the_gram_distance_of_matrices_of_length_one():
    x, y = pair("power-law", 30, 8, 12)
    unit = [a / np.linalg.norm(geometry.centred(a).T @ geometry.centred(a)) ** 0.5 for a in (x, y)]
    np.testing.assert_allclose(
        losses.cka(*single(x, y)), losses.gram(*single(*unit)) / 2, rtol=1e-4
    )


@slow
@functions
@pytest.mark.parametrize(("n", "d", "e"), SHAPES)
def test_degenerate_features(function, n, d, e):
    x, y = single(*pair("clustered", n, d, e))
    point = jnp.broadcast_to(x[:1] + 0.7, x.shape)
    cases = {
        "a constant student": (point, y),
        "a constant teacher": (x, jnp.broadcast_to(y[:1], y.shape)),
        "both constant": (point, jnp.broadcast_to(y[:1], y.shape)),
        "at 0": (0 * x, 0 * y),
        "one row": (x[:1], y[:1]),
        "identical": (x, x),
        "one direction": (x.at[:, 1:].set(0.7), y),
        "two equal columns": (x.at[:, 1].set(x[:, 0]), y),
        "orthogonal": (x.at[::2].set(0), y.at[1::2].set(0)),
        "tiny": (1e-6 * x, y),
        "huge": (1e4 * x, 1e4 * y),
    }
    values = {}
    for case, (a, b) in cases.items():
        value, gradients = compiled(function)(a, b)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients), case
        values[case] = float(value)
    for case in ("both constant", "at 0", "one row", "identical"):
        assert abs(values[case]) < 1e-6, case
    of_teacher = np.asarray(y, np.float64) - np.asarray(y, np.float64).mean(0)
    expected = {
        "procrustes": (of_teacher**2).sum() / n,
        "gram": ((of_teacher.T @ of_teacher) ** 2).sum() / n**2,
        "cka": 1.0,  # by choice
    }[function.__name__]
    np.testing.assert_allclose(values["a constant student"], expected, rtol=1e-4)


def test_the_gradient_at_a_constant_student_is_zero():
    x, y = single(*pair("clustered", 30, 8, 12))
    for function in LOSSES:
        _, (gradient, _) = compiled(function)(jnp.broadcast_to(x[:1], x.shape), y)
        assert not np.any(gradient), function.__name__


@slow
@functions
def test_a_step_against_the_gradient_lowers_it_where_rank_is_lacking(function):
    """Two of eight directions are dead on one side, three on the other."""
    x, y = single(*pair("gaussian", 30, 8, 8))
    x, y = x.at[:, :2].set(0), y.at[:, 5:].set(1.5)
    value, (gradient, _) = compiled(function)(x, y)
    size = 0.05 * value / (gradient**2).sum()
    lower = function(x - size * gradient, y)
    np.testing.assert_allclose(value - lower, 0.05 * value, rtol=0.25)


@slow
@functions
def test_second_derivatives(function):
    for n, d in ((20, 4), (5, 8)):
        x, y = pair("gaussian", n, d, d)
        direction = np.random.default_rng(4).normal(size=x.shape)
        with jax.enable_x64(True):
            slope = jax.grad(functools.partial(function, z_t=jnp.asarray(y)))
            _, turn = jax.jvp(slope, (jnp.asarray(x),), (jnp.asarray(direction),))
            ahead, behind = (slope(jnp.asarray(x + s * 1e-5 * direction)) for s in (1, -1))
            np.testing.assert_allclose(turn, (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-6)


@slow
def test_no_n_by_n_matrix_where_samples_outnumber_features():
    n, d = 512, 16
    for function in LOSSES:
        z = jnp.zeros((n, d))
        program = jax.jit(jax.value_and_grad(function)).lower(z, z).compile()
        assert f"[{n},{n}]" not in program.as_text()


def test_rows_must_pair():
    with pytest.raises(ValueError, match="row i of both must be the same example"):
        losses.procrustes(jnp.ones((4, 2)), jnp.ones((3, 5)))
