"""Gaussian losses to a teacher of which statistics are left, and rows drawn from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.oracles import gaussian_kl, gaussian_w2, ridge

from kd2m_jax import losses

RNG = np.random.default_rng(0)
D = 5
Y_S = np.array([0] * 7 + [1] * 4 + [2] * 1 + [5] * 2 + [-1] * 3)
Y_T = np.array([2] * 9 + [0] * 15 + [3] * 14 + [1] * 12)
CENTRES = 3 * RNG.normal(size=(8, D))
Z_S = CENTRES[Y_S] + RNG.normal(size=(len(Y_S), D))
Z_T = CENTRES[Y_T] + 0.7 * RNG.normal(size=(len(Y_T), D)) + 0.3
SHARED = (0, 1, 2)
FULL = losses.class_statistics(Z_T, Y_T)
DIAGONAL = losses.class_statistics(Z_T, Y_T, covariance="diagonal")
LABELLED = {"gaussian-cw2", "gaussian-ckl"}
OPTIONS = {
    "gaussian-w2": ({}, {"covariance": "diagonal"}),
    "gaussian-cw2": ({}, {"covariance": "diagonal"}),
    "gaussian-kl": ({}, {"covariance": "diagonal"}, {"direction": "teacher_student"}),
    "gaussian-ckl": ({}, {"covariance": "diagonal"}, {"direction": "teacher_student"}),
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
# One of each kind; the others are walked with the slow tests.
every = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name,
            options,
            id="-".join([name, *options.values()]),
            marks=()
            if name in ("gaussian-w2", "gaussian-ckl") and not options
            else pytest.mark.slow,
        )
        for name, options in CASES
    ],
)


def single(a):
    return jnp.asarray(a, jnp.float32)


def of(name, z_t, options, z_s=Z_S, **given):
    """Value and gradient with respect to the student's features."""
    function = losses.METRICS[name].function
    given |= {"labels": Y_S} if name in LABELLED else {}
    call = lambda z: function(z, z_t, **given, **options)  # noqa: E731
    return jax.value_and_grad(call)(single(z_s))


def test_class_statistics_are_those_of_numpy():
    assert FULL.means.shape == (4, D) and FULL.covariances.shape == (4, D, D)
    for c in range(4):
        rows = Z_T[c == Y_T]
        np.testing.assert_allclose(FULL.means[c], rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            FULL.covariances[c], np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(DIAGONAL.covariances[c], rows.var(0), rtol=1e-5)
    np.testing.assert_allclose(FULL.shares, np.bincount(Y_T) / len(Y_T), rtol=1e-6)
    mixture = FULL.marginal()
    np.testing.assert_allclose(mixture.means[0], Z_T.mean(0), rtol=1e-4)
    np.testing.assert_allclose(mixture.covariances[0], np.cov(Z_T.T, bias=True), rtol=1e-4)
    np.testing.assert_allclose(DIAGONAL.marginal().variances()[0], Z_T.var(0), rtol=1e-4)
    some = losses.class_statistics(Z_T, np.where(Y_T == 3, -1, Y_T), num_classes=6)
    np.testing.assert_array_equal(some.shares > 0, [True] * 3 + [False] * 3)


@every
def test_statistics_are_as_good_as_the_rows(name, options):
    value, gradient = of(name, FULL, options)
    apart = {"labels_t": Y_T} if name in LABELLED else {}
    rows, of_rows = of(name, single(Z_T), options, **apart)
    rtol = 1e-3
    if name == "gaussian-ckl":  # its ridge is that of the mixture, not of the classes in common
        there = np.isin(Y_T, SHARED)
        z_t, y_t = Z_T[there], Y_T[there]
        rows, of_rows = of(name, single(z_t), options, labels_t=y_t)
        value, gradient = of(name, losses.class_statistics(z_t, y_t), options)
    np.testing.assert_allclose(value, rows, rtol=rtol)
    np.testing.assert_allclose(gradient, of_rows, rtol=0, atol=5e-3 * np.abs(of_rows).max())
    if "covariance" in options and name != "gaussian-ckl":
        np.testing.assert_allclose(of(name, DIAGONAL, options)[0], rows, rtol=rtol)


@pytest.mark.slow
def test_the_values_are_those_of_the_oracles():
    by_class = lambda f: np.mean([f(Z_S[c == Y_S], Z_T[c == Y_T]) for c in SHARED])  # noqa: E731
    found = {
        "gaussian-w2": gaussian_w2(Z_S, Z_T),
        "gaussian-cw2": by_class(gaussian_w2),
        "gaussian-kl": gaussian_kl(Z_S, Z_T, s=ridge(Z_S, Z_T, 0.1)),
        # Of the rows that count, and of the mixture.
        "gaussian-ckl": by_class(
            functools.partial(gaussian_kl, s=ridge(Z_S[np.isin(Y_S, SHARED)], Z_T, 0.1))
        ),
    }
    for name, expected in found.items():
        np.testing.assert_allclose(of(name, FULL, {})[0], expected, rtol=1e-3, err_msg=name)


@pytest.mark.slow
@every
def test_rows_that_do_not_count(name, options):
    where = np.arange(len(Y_S)) % 3 != 1
    value, gradient = of(name, FULL, options, np.where(where[:, None], Z_S, np.nan), where=where)
    function = losses.METRICS[name].function
    labels = {"labels": Y_S[where]} if name in LABELLED else {}
    np.testing.assert_allclose(
        value, function(single(Z_S[where]), FULL, **labels, **options), rtol=1e-4
    )
    assert not np.any(gradient[~where]) and np.isfinite(gradient).all()
    nothing, none = of(name, FULL, options, where=np.zeros(len(Y_S), bool))
    assert nothing == 0 and not np.any(none)


@pytest.mark.slow
@every
def test_one_sample_and_a_batch_smaller_than_the_features(name, options):
    function = losses.METRICS[name].function
    for n in (1, 3):
        labels = {"labels": Y_S[:n]} if name in LABELLED else {}
        call = lambda z, labels=labels: function(z, FULL, **labels, **options)  # noqa: E731
        value, gradient = jax.value_and_grad(call)(single(Z_S[:n]))
        assert np.isfinite(value) and np.isfinite(gradient).all() and np.any(gradient)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales(scale):
    for name in OPTIONS:
        scaled = losses.class_statistics(Z_T, Y_T)
        scaled = scaled._replace(
            means=scaled.means * scale, covariances=scaled.covariances * scale * scale
        )
        factor = 1.0 if "kl" in name else scale**2
        value, _ = of(name, scaled, {}, Z_S * scale)
        np.testing.assert_allclose(value, of(name, FULL, {})[0] * factor, rtol=1e-3)


@pytest.mark.parametrize("statistics", [FULL, DIAGONAL], ids=["full", "diagonal"])
def test_rows_that_are_drawn_have_the_statistics(statistics):
    z, labels = statistics.draw(jax.random.key(0), 40_000)
    found = losses.class_statistics(z, labels, covariance="full")
    np.testing.assert_allclose(found.shares, statistics.shares, atol=0.01)
    np.testing.assert_allclose(found.means, statistics.means, atol=0.05)
    np.testing.assert_allclose(found.covariances, statistics.full(), atol=0.06)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: losses.gaussian_w2(Z_S[:, :3], FULL), ValueError, "the statistics are of 5"),
        (lambda: losses.gaussian_cw2(Z_S, FULL, Y_S, labels_t=Y_T), ValueError, "have none"),
        (lambda: losses.gaussian_w2(Z_S, FULL, covariance="no"), ValueError, "covariance"),
        (lambda: losses.class_statistics(Z_T, Y_T[:4]), ValueError, r"shape \[50\], got \[4\]"),
        (lambda: losses.class_statistics(Z_T, Y_T - 3), ValueError, "below 1, or -1"),
        (lambda: losses.class_statistics(Z_T, 0 * Y_T - 1), ValueError, "no row has a class"),
        (lambda: losses.class_statistics(Z_T, Y_T, num_classes=2), ValueError, "below 2"),
        (lambda: jax.jit(losses.class_statistics)(Z_T, Y_T), TypeError, "outside jit"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert np.isnan(losses.gaussian_cw2(single(Z_S), FULL, Y_S - 1))
