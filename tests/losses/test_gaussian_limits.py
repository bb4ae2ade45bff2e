"""Gaussian distances where float32 is short of digits: unequal scales, curvature, units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import draw
from draws import single
from reference import oracles

from kd2m_jax import losses
from kd2m_jax.losses import _polar

LABELS = [1, 3]
SHAPES = [(60, 8), (24, 40)]
shapes = pytest.mark.parametrize(("n", "d"), SHAPES)
by_class = pytest.mark.parametrize("classes", LABELS)


def function(name, labels):
    """Return the marginal loss for one class, the conditional one for several."""
    if labels.max() == 0:
        return getattr(losses, name)
    conditional = getattr(losses, name.replace("gaussian_", "gaussian_c"))
    return functools.partial(conditional, labels=jnp.asarray(labels))


def graded(n, d, span, *, classes=1, seed=0):
    """Features from 10^-span to 10^span, the student 5% of each feature's own scale away."""
    rng = np.random.default_rng(seed)
    scale = np.logspace(-span, span, d)
    y = rng.normal(size=(n, d)) * scale
    x = y + 0.05 * rng.normal(size=(n, d)) * scale
    return *(z.astype(np.float32).astype(np.float64) for z in (x, y)), np.arange(n) % classes


def w2_and_gradient(x, y, labels):
    """Return the distance by class and its gradient ``2 (X - P Y)``, by a float64 polar."""
    value, gradient, classes = 0.0, np.zeros_like(x), np.unique(labels)
    for c in classes:
        rows = labels == c
        share = len(classes) * rows.sum()
        gap = x[rows].mean(0) - y[rows].mean(0)
        p, q = (z[rows] - z[rows].mean(0) for z in (x, y))
        u, s, vt = np.linalg.svd(p @ q.T, full_matrices=False)
        polar = (u * (s > 1e-13 * s[0])) @ vt
        value += (gap @ gap) / len(classes)
        value += (((p - polar @ q) ** 2).sum() + ((q - polar.T @ polar @ q) ** 2).sum()) / share
        gradient[rows] = 2 * (p - polar @ q + gap) / share
    return value, gradient


@shapes
@by_class
@pytest.mark.parametrize("span", [1, 3])
def test_each_feature_is_right_to_its_own_scale(n, d, classes, span):
    """Six orders of magnitude apart: near equality the value was 0.69 for 0.005."""
    x, y, labels = graded(n, d, span, classes=classes)
    expected, slope = w2_and_gradient(x, y, labels)
    w2 = function("gaussian_w2", labels)
    value, gradient = jax.value_and_grad(w2)(*single(x, y))
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    np.testing.assert_allclose(value, oracle("gaussian_w2", x, y, labels), rtol=2e-2)
    error = np.abs(gradient - slope).max(axis=0) / np.abs(slope).max(axis=0)
    assert error.max() < 1e-2
    diagonal = function("gaussian_w2", labels)(*single(x, y), covariance="diagonal")
    expected = oracle("gaussian_w2", x, y, labels, kind="diagonal")
    np.testing.assert_allclose(diagonal, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("held", "lost", "single_precision"), [(1e-6, 1e-8, False), (1e-2, 1e-3, True)]
)
def test_where_the_scales_of_features_end(monkeypatch, held, lost, single_precision):
    """Which of them the docstring says: on CPUs and GPUs, and where there is only float32."""
    if single_precision:
        single32 = functools.partial(_polar._factors, _polar.by_products)
        monkeypatch.setattr(_polar, "factors", single32)
    rng = np.random.default_rng(0)
    y = rng.normal(size=(60, 4))
    x = y * (1 + 0.05 * rng.normal(size=(60, 4)))

    def gradient(scale):
        small = np.array([1, 1, 1, scale])
        given = single(small * x, small * y)
        slope = jax.grad(losses.gaussian_w2.__wrapped__)(*given)  # not the program of another test
        return np.asarray(slope, np.float64)[:, 3] / scale

    # Nothing couples it to the others but the shared pairing, so its share does not change.
    _, slope = w2_and_gradient([1, 1, 1, 1e-4] * x, [1, 1, 1, 1e-4] * y, np.zeros(60))
    expected = slope[:, 3] / 1e-4
    np.testing.assert_allclose(gradient(held), expected, atol=2e-2 * np.abs(expected).max())
    assert np.abs(gradient(lost)).max() > 10 * np.abs(expected).max()


def test_features_that_are_constant_up_to_rounding():
    """Centring leaves columns of rounding, all along the ones: no two directions, but none."""
    x = np.array([[0.0, 1.5, 1.5]] + 5 * [[1.5, 1.5, 1.5]])
    y = np.array([[0.0, 1.0, 0.0]] + 5 * [[0.0, 0.0, 0.0]])
    for a, b in ((x, y), (y, x)):
        value = jax.jit(losses.gaussian_w2)(*single(a, b))
        np.testing.assert_allclose(value, oracles.gaussian_w2(a, b), rtol=1e-6)


@pytest.mark.parametrize("d", [31, 32, 33, 40])
def test_kl_over_features_is_kl_over_samples(d):
    """On both sides of n = d; one class holds everyone, which takes the other form."""
    x, y, _ = draw("clustered", 33, d)
    kl = losses.gaussian_kl(*single(x, y))
    np.testing.assert_allclose(kl, losses.gaussian_ckl(*single(x, y), np.zeros(33, int)), rtol=1e-5)
    expected = oracle("gaussian_kl", x, y, np.zeros(33, int), s=oracles.ridge(x, y, 0.1))
    np.testing.assert_allclose(kl, expected, rtol=1e-5)


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3])
def test_kl_of_clouds_that_nearly_agree(step):
    """Over features right to 1e-3 of itself; over samples to 1e-4 nats, where rounding begins."""
    x, y, labels = draw("gaussian", 66, 32)
    x = y + step * x
    x, y = (z.astype(np.float32).astype(np.float64) for z in (x, y))
    s = oracles.ridge(x, y, 0.1)
    expected = oracle("gaussian_kl", x, y, 0 * labels, s=s)
    np.testing.assert_allclose(losses.gaussian_kl(*single(x, y)), expected, rtol=1e-3)
    one = losses.gaussian_ckl(*single(x, y), 0 * labels)
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)
    if step == 1e-3:  # what the docstring says
        assert abs(one - expected) > 1e-2 * expected
    # The gradient, which the values' cancellation does not touch, stays right in both.
    slopes = [
        np.asarray(jax.grad(f)(*single(x, y)))
        for f in (losses.gaussian_kl, functools.partial(losses.gaussian_ckl, labels=0 * labels))
    ]
    np.testing.assert_allclose(*slopes, atol=1e-2 * np.abs(slopes[0]).max())


def oracle(name, x, y, labels, **options):
    return oracles.by_class(getattr(oracles, name), x, y, labels, **options)


@pytest.mark.slow
@shapes
@by_class
@pytest.mark.parametrize("name", ["gaussian_w2", "gaussian_kl"])
@pytest.mark.parametrize("side", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_second_derivatives(n, d, classes, name, side):
    """Hessian-vector products, forward and reverse over reverse; they were off by 64% to 183%."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(n, d))
    clouds = [y + 0.5 * rng.normal(size=(n, d)), y]
    labels = np.arange(n) % classes
    direction, probe = rng.normal(size=(2, n, d))
    if name == "gaussian_w2":

        def slope(z):
            given = (z, y) if side == 0 else (z, clouds[0])  # it is symmetric
            return w2_and_gradient(*given, labels)[1]

        h = 1e-5
        change = (slope(clouds[side] + h * direction) - slope(clouds[side] - h * direction)) / 2 / h
        expected = (change * probe).sum()
    else:
        s = oracles.ridge(*clouds, 0.1)  # a constant for every derivative

        def value(a, b):
            moved = clouds[side] + a * direction + b * probe
            return oracle(name, *((moved, y) if side == 0 else (clouds[0], moved)), labels, s=s)

        h = 1e-3
        expected = (value(h, h) - value(h, -h) - value(-h, h) + value(-h, -h)) / (4 * h * h)
    x32, y32, v, w = single(*clouds, direction, probe)
    loss = function(name, labels)
    along = (lambda z: loss(z, y32)) if side == 0 else (lambda z: loss(x32, z))
    at = (x32, y32)[side]
    forward = jnp.vdot(jax.jvp(jax.grad(along), (at,), (v,))[1], w)
    reverse = jnp.vdot(jax.grad(lambda z: jnp.vdot(jax.grad(along)(z), v))(at), w)
    scale = np.linalg.norm(jax.jvp(jax.grad(along), (at,), (v,))[1]) * np.linalg.norm(probe)
    np.testing.assert_allclose([forward, reverse], expected, rtol=1e-2, atol=1e-4 * scale)


def test_third_derivatives_are_refused():
    x, y, _ = draw("gaussian", 12, 4)
    x, y = single(x, y)
    second = lambda z: jax.jvp(jax.grad(lambda z: losses.gaussian_w2(z, y)), (z,), (z,))[1]  # noqa: E731
    with pytest.raises(NotImplementedError, match="third derivatives"):
        jax.jvp(second, (x,), (x,))


SCALED = [  # a loss, and the power of the unit that its value has
    (losses.gaussian_kl, {}, 0),
    (losses.gaussian_kl, {"covariance": "diagonal"}, 0),
    (losses.gaussian_w2, {}, 2),
    (losses.gaussian_w2, {"covariance": "diagonal"}, 2),
    (losses.gw2, {}, 2),
    (losses.mmd, {"kernel": "rbf"}, 0),
    (losses.mmd, {"kernel": "energy"}, 1),
    (losses.mmd, {"kernel": "linear"}, 2),
    (losses.sw2, {"key": jax.random.key(0)}, 2),
    (losses.l2, {}, 2),
]


@pytest.mark.parametrize(
    ("loss", "options", "power"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}") for case in SCALED],
)
@pytest.mark.parametrize("unit", [1e18, 1e-15, 1e-22])
def test_units_whose_squares_are_no_numbers(loss, options, power, unit):
    """gaussian_kl was 0 at 1e19 and its gradient too: a silent end of training."""
    x, y, _ = draw("gaussian", 14, 4)
    both = jax.value_and_grad(functools.partial(loss, **options))
    value, grads = both(*single(x, y))
    found, grads_found = both(*single(unit * x, unit * y))
    expected = np.float64(value) * float(unit) ** power
    if 1e-37 < expected < 3e38:
        np.testing.assert_allclose(np.float64(found), expected, rtol=1e-3)
    else:  # no number of float32
        assert found == (0 if expected < 1 else np.inf)
    expected = np.asarray(grads, np.float64) * float(unit) ** (power - 1)
    np.testing.assert_allclose(
        np.asarray(grads_found, np.float64), expected, rtol=1e-2, atol=1e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("unit", [1e19, 1e-20, 1e30])
def test_maps_of_any_unit(unit):
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(3, 4, 4, 3))
    x, y = single(maps, maps + 0.3 * rng.normal(size=maps.shape))
    value, grads = jax.value_and_grad(losses.nst)(x, y)
    found, grads_found = jax.value_and_grad(losses.nst)(unit * x, unit * y)
    np.testing.assert_allclose(found, value, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(grads_found, np.float64) * unit, grads, rtol=1e-3)


def test_one_sample_does_not_hide_nan():
    for bad in (np.nan, np.inf):
        x, y = np.full((1, 3), bad, np.float32), np.ones((1, 2), np.float32)
        assert np.isnan(losses.gw2(x, y)) and np.isnan(losses.gw2(y, x))
    assert losses.gw2(y, y) == 0
