"""The chain of the theorem: its six numbers, and their order whatever the clouds."""

import jax.numpy as jnp
import numpy as np
import pytest
from clouds import KINDS, draw
from reference import transport

from kd2m_jax import theory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 8.0])
def test_values(kind, bandwidth):
    x, y, _ = draw(kind, 40, 12)
    measured = theory.bound(x.astype(np.float32), y.astype(np.float32), bandwidth=bandwidth)
    for name, expected in transport.chain(x, y, bandwidth).items():
        np.testing.assert_allclose(getattr(measured, name), expected, rtol=1e-3, atol=3e-4)


def assert_ordered(chain, *, lipschitz, slack=3e-4):
    """Allow the root of float32's rounding, which a distance near 0 in H may be off by."""
    gap, w, l2, mmd, euclidean_w2, euclidean_l2 = map(float, chain)
    assert np.isfinite(chain).all()
    np.testing.assert_allclose(gap, mmd, rtol=1e-3, atol=slack)
    assert 0 <= gap <= mmd + slack
    assert mmd <= w + slack
    assert w <= l2 + slack
    assert l2 <= 2**0.5 + slack
    assert euclidean_w2 <= euclidean_l2 * (1 + 1e-5)
    if lipschitz:
        assert l2 <= euclidean_l2 * (1 + 1e-5)
        assert w <= euclidean_w2 * (1 + 1e-5)


slow = [pytest.param(bandwidth, marks=pytest.mark.slow) for bandwidth in (0.3, 3.0)]


@pytest.mark.parametrize("bandwidth", [1.0, *slow])
def test_order_over_many_clouds(bandwidth):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n, d = ((16, 3), (16, 24))[seed % 2]
        # From nearly equal to far apart, from tight to wide, and shifted or not.
        spread, move, shift = 10.0 ** rng.uniform([-3, -6, -3], [1, 1, 1])
        x = spread * rng.normal(size=(n, d))
        y = x[rng.permutation(n)] if seed % 3 == 0 else x + move * rng.normal(size=(n, d))
        chain = theory.bound(
            jnp.asarray(x, jnp.float32),
            jnp.asarray(y + shift * (seed % 5 == 0), jnp.float32),
            bandwidth=bandwidth,
        )
        assert_ordered(chain, lipschitz=bandwidth >= 1)


def test_order_on_degenerate_clouds():
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    point = np.full_like(x, 0.7)
    pairs = [(x, x), (point, point), (x, point), (point, x), (0 * x, 0 * x), (1e-4 * x, -1e-4 * x)]
    pairs += [(1e4 * x, 1e4 * x[::-1]), (x[:1], x[1:2]), (x[:1], x[:1]), (x, x + 1e-4)]
    for pair in pairs:
        assert_ordered(theory.bound(*pair, bandwidth=1.0), lipschitz=True)
    for pair in pairs[:2]:
        assert all(value == 0 for value in theory.bound(*pair, bandwidth=1.0))


def test_no_unit_norm_loss_has_a_larger_gap():
    x, y, _ = draw("gaussian", 20, 4)
    chain = theory.bound(x.astype(np.float32), y.astype(np.float32), bandwidth=2.0)
    kernel = lambda p, q: np.exp(-((p[:, None] - q) ** 2).sum(-1) / 8)  # noqa: E731
    rng = np.random.default_rng(0)
    for _ in range(50):
        anchors, weights = 2 * rng.normal(size=(6, 4)), rng.normal(size=6)
        norm = np.sqrt(weights @ kernel(anchors, anchors) @ weights)
        risks = [(kernel(z, anchors) @ weights).mean() / norm for z in (x, y)]
        assert abs(risks[0] - risks[1]) <= chain.gap


def test_types_and_mistakes():
    x = jnp.zeros((16, 3))
    measured = theory.bound(x.astype(jnp.bfloat16), x + 1, bandwidth=1.0)
    assert {a.dtype for a in measured} == {jnp.dtype(jnp.float32)}
    with pytest.raises(ValueError, match="bandwidth must be > 0"):
        theory.bound(x, x, bandwidth=0.0)
    with pytest.raises(ValueError, match="same example"):
        theory.bound(x, x[:3], bandwidth=1.0)
