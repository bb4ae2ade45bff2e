"""MMD where float32 is short of digits: near equality, a large common part, equal points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import single
from reference import family

from kd2m_jax import losses

KERNELS = ("polynomial", "rbf", "energy")
kernels = pytest.mark.parametrize("kernel", KERNELS)


def near(step, *, n=60, d=24, common=0.0, seed=0):
    """Return a student that is ``step`` away from its teacher, both with a large common part."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(n, d)) + common
    x = y + step * rng.normal(size=(n, d))
    return [z.astype(np.float32).astype(np.float64) for z in (x, y)]


def bandwidth(x, y):
    """Return the sigma of "mean", for an oracle that holds it constant."""
    z = np.concatenate([x, y])
    return (2 * ((z - z.mean(0)) ** 2).sum() / (len(z) - 1)) ** 0.5


def pairs(kernel, x, y, sigma):
    """Return the four kernel values of each pair of rows, in float64."""
    squares = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1)  # noqa: E731
    k = {
        "polynomial": lambda a, b: (a @ b.T + 1) ** 2,
        "rbf": lambda a, b: np.expm1(-squares(a, b) / (2 * sigma**2)),
        "energy": lambda a, b: -np.sqrt(squares(a, b)),
    }[kernel]
    return (k(x, x) - k(x, y)) + (k(y, y) - k(y, x))


def gradient(kernel, x, y, sigma):
    """With respect to x, by central differences of one coordinate after the other."""
    h, found = 1e-5, np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        up, down = (pairs(kernel, x + s, y, sigma).mean() for s in (step, -step))
        found[index] = (up - down) / (2 * h)
    return found


@kernels
@pytest.mark.parametrize("step", [1.0, 1e-1, 1e-2, 1e-3])
def test_near_equality(kernel, step):
    """To 1e-4; by differences of kernel values 1e-3 away was off by 1.5%, 1e-4 by 1,700%."""
    x, y = near(step)
    expected = pairs(kernel, x, y, bandwidth(x, y)).mean()
    loss = functools.partial(losses.mmd, kernel=kernel)
    np.testing.assert_allclose(loss(*single(x, y)), expected, rtol=1e-4)
    assert loss(*single(x, x)) == 0
    np.testing.assert_array_equal(jax.grad(loss)(*single(x, x)), 0)
    labels = np.arange(60) % 3
    by_class = [pairs(kernel, x, y, bandwidth(x, y))[np.ix_(r, r)].mean() for r in map(
        np.flatnonzero, (labels == c for c in range(3)))]  # fmt: skip
    found = losses.cmmd(*single(x, y), labels, kernel=kernel)
    np.testing.assert_allclose(found, np.mean(by_class), rtol=1e-4)


@kernels
@pytest.mark.parametrize("step", [1.0, 1e-2])
def test_gradients_near_equality(kernel, step):
    x, y = near(step, n=12, d=5)
    expected = gradient(kernel, x, y, bandwidth(x, y))
    loss = functools.partial(losses.mmd, kernel=kernel)
    found = jax.grad(loss)(*single(x, y))
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
    other = jax.grad(loss, argnums=1)(*single(y, x))  # the kernels are symmetric
    np.testing.assert_allclose(other, found, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
@pytest.mark.parametrize("m", [60, 45])
def test_a_large_common_part(degree, m):
    """Features around 100: degree 2 gave -2,456 for 12,433. As many rows on both sides or not."""
    x, y = near(0.5, common=100.0)
    y = y[:m]
    k = lambda a, b: (a @ b.T + 1) ** degree  # noqa: E731
    expected = k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()
    value = losses.mmd(*single(x, y), kernel="polynomial", degree=degree)
    np.testing.assert_allclose(value, expected, rtol=1e-2)


@pytest.mark.parametrize("kernel", ["rbf", "energy"])
def test_points_that_coincide_and_outliers(kernel):
    """Where products lose the digits, differences keep them."""
    rng = np.random.default_rng(0)
    x, y = near(0.3)
    twice = x[rng.integers(0, 20, 60)]  # every point several times
    close = x.mean(0) + 1e-4 * (x - x.mean(0))
    far = x.copy()
    far[0] *= 300
    for a, b in ((twice, y), (twice, twice[::-1]), (close, y), (close, 1.5 * close), (far, y)):
        a, b = (z.astype(np.float32).astype(np.float64) for z in (a, b))
        expected = pairs(kernel, a, b, bandwidth(a, b)).mean()
        found = losses.mmd(*single(a, b), kernel=kernel)
        scale = np.abs(pairs(kernel, a, a.mean(0) + 0 * a, bandwidth(a, b))).mean()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * scale)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 30.0])
def test_bandwidths_far_from_the_distances(sigma):
    x, y = near(0.3)
    expected = pairs("rbf", x, y, sigma).mean()
    found = losses.mmd(*single(x, y), bandwidth=sigma)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@kernels
def test_second_derivatives(kernel):
    x, y = near(0.5, n=10, d=4)
    direction = np.random.default_rng(1).normal(size=x.shape)
    sigma = bandwidth(x, y)  # a constant for every derivative
    h = 1e-4
    slopes = [gradient(kernel, x + s * direction, y, sigma) for s in (h, -h)]
    expected = (slopes[0] - slopes[1]) / (2 * h)
    options = {"bandwidth": float(sigma)} if kernel == "rbf" else {}
    x32, y32, v = single(x, y, direction)
    slope = jax.grad(lambda z: losses.mmd(z, y32, kernel=kernel, **options))
    forward = jax.jvp(slope, (x32,), (v,))[1]
    reverse = jax.grad(lambda z: jnp.vdot(slope(z), v))(x32)
    for found in (forward, reverse):
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3 * np.abs(expected).max())


def test_degree_has_a_limit():
    with pytest.raises(ValueError, match="degree must be at most 64, got 65"):
        losses.mmd(*single(*near(1.0)), kernel="polynomial", degree=65)


def test_the_oracle_of_the_family_agrees():
    x, y = near(0.5)
    for kernel in KERNELS:
        sigma = bandwidth(x, y)
        expected = family.mmd(x, y, kernel, **({"sigma": sigma} if kernel == "rbf" else {}))
        np.testing.assert_allclose(pairs(kernel, x, y, sigma).mean(), expected, rtol=1e-6)
