"""The polar factor behind the full-covariance Gaussian W2: two ways to it, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd2m_jax import losses
from kd2m_jax.losses import _polar

FACTORS = [_polar.polar_by_svd, _polar.polar_by_products]


def factor_of(factor, k):
    return np.asarray(factor(k, _polar.tolerance(k)), np.float64)


def masked(n, d, scale, classes=4):
    """K of centred classes, each block's norm at most 1, one class at another scale; and rows Y."""
    rng, labels = np.random.default_rng(0), np.arange(n) % classes
    x = rng.normal(size=(n, d))
    y = x + 0.3 * rng.normal(size=(n, d))
    for c in range(classes):
        mine = labels == c
        for z in (x, y):
            z[mine] -= z[mine].mean(0)
            z[mine] *= (scale if c == 0 else 1) / np.linalg.norm(z[mine])
    x, y = (z / np.where(labels == 0, scale, 1)[:, None] for z in (x, y))  # as _scaled does
    return (x @ y.T) * (labels[:, None] == labels), y


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("n", "d"), [(48, 96), (48, 24)])
def test_null_directions_are_left_out(factor, n, d):
    """Against float64: four of the directions are null, from centring."""
    k, y = masked(n, d, 1e-3)
    u, s, vt = np.linalg.svd(k)
    expected = (u * (s > 1e-10)) @ vt
    k32 = jnp.asarray(k, jnp.float32)
    found = factor_of(factor, k32)
    assert (found * k).sum() == pytest.approx(s.sum(), rel=2e-6)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found @ y, expected @ y, atol=1e-5)


@pytest.mark.parametrize("factor", FACTORS)
def test_zero_and_rank_one(factor):
    zero, one = jnp.zeros((6, 6)), jnp.ones((6, 6)) / 6
    np.testing.assert_array_equal(factor_of(factor, zero), zero)
    np.testing.assert_allclose(factor_of(factor, one), one, atol=1e-6)
    wide = jnp.eye(3, 5) / 2
    np.testing.assert_allclose(factor_of(factor, wide), 2 * wide, atol=1e-6)
    np.testing.assert_allclose(factor_of(factor, wide.T), 2 * wide.T, atol=1e-6)


def test_more_samples_than_features_cost_no_n_by_n_matrix():
    d = 16

    def program(n):
        z = jnp.zeros((n, d))
        both = jax.jit(jax.value_and_grad(losses.gaussian_w2))
        return both.lower(z, z).compile()

    few, many = program(4 * d), program(16 * d)
    assert many.cost_analysis()["flops"] < 4.2 * few.cost_analysis()["flops"]
    n = 16 * d
    assert f"[{n},{n}]" not in many.as_text()
    assert many.memory_analysis().temp_size_in_bytes < 4 * n * n
