"""scf: characteristic functions along random lines, against float64, and its relation to MMD."""

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
KEY = jax.random.key(3)
scf = functools.partial(losses.scf, key=KEY, projections=8)


def lines(d, projections=8):
    """Return the directions that the key draws."""
    drawn = np.asarray(jax.random.normal(KEY, (d, projections)), np.float64)
    return drawn / np.linalg.norm(drawn, axis=0)


@pytest.mark.parametrize(
    "kind", [KINDS[0], *(pytest.param(kind, marks=slow) for kind in KINDS[1:])]
)
def test_value_and_gradients(kind):
    x, y, _ = draw(kind, 30, 8)
    frozen = {"unit": geometry.line_unit(x, y), "directions": lines(8)}
    check(scf, functools.partial(geometry.scf, **frozen), x, y)


@slow
@pytest.mark.parametrize("frequencies", [1, 8, 40])
def test_unequal_clouds_and_other_grids(frequencies):
    x, y = draw("gaussian", 40, 5)[:2]
    x, y = 3 * x[:25] + 1, y
    value = scf(*single(x, y), frequencies=frequencies)
    expected = geometry.scf(x, y, lines(5), frequencies=frequencies)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@slow
def test_it_is_the_mean_mmd_of_lines():
    for kind in KINDS:
        x, y, _ = draw(kind, 48, 16)
        expected = geometry.sliced_mmd(x, y, lines(16))
        np.testing.assert_allclose(scf(*single(x, y)), expected, rtol=1e-3)
        # LeJEPA's grid is enough where no sample is far out.
        np.testing.assert_allclose(scf(*single(x, y), frequencies=8), expected, rtol=1e-2)
    x[0] *= 30  # its pull repeats along the grid, which a finer one does not
    expected = geometry.sliced_mmd(x, y, lines(16))
    np.testing.assert_allclose(scf(*single(x, y), frequencies=64), expected, rtol=1e-3)
    assert abs(scf(*single(x, y), frequencies=8) / expected - 1) > 0.05


@slow
def test_near_equality():
    y = draw("gaussian", 40, 8)[0]
    for step in (1e-2, 1e-3, 1e-4):
        x = y + step * np.random.default_rng(2).normal(size=y.shape)
        x, y = (a.astype(np.float32).astype(np.float64) for a in (x, y))
        np.testing.assert_allclose(scf(*single(x, y)), geometry.scf(x, y, lines(8)), rtol=2e-2)


@slow
def test_degenerate_clouds():
    x, y = single(*draw("gaussian", 20, 8)[:2])
    point = jnp.broadcast_to(x[:1], x.shape)
    for case, (a, b) in {
        "one point": (point, point),
        "two points": (point, point + 1),
        "at 0": (0 * x, 0 * y),
        "one row": (x[:1], y[:1]),
        "collapsed": (point, y),
        "dead columns": (x.at[:, 2:].set(0.7), y.at[:, 2:].set(0.7)),
        "1e4 and 1e-4": (1e4 * x, 1e-4 * y),
    }.items():
        value, gradients = compiled(scf)(a, b)
        assert 0 <= value <= 4 and all(np.isfinite(g).all() for g in gradients), case
        assert (value == 0) == (case in ("one point", "at 0")), case


@slow
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_a_common_scale_changes_nothing(scale):
    x, y = single(*draw("gaussian", 20, 8)[:2])
    value, (gradient, _) = compiled(scf)(x, y)
    again, (scaled, _) = compiled(scf)(scale * x, scale * y)
    np.testing.assert_allclose(again, value, rtol=1e-4)
    np.testing.assert_allclose(scale * scaled, gradient, atol=1e-4 * jnp.abs(gradient).max())


def test_mistakes_are_named():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="scf draws random directions: give it a key"):
        losses.scf(x, x)
    with pytest.raises(ValueError, match="frequencies must be an integer >= 1, got 0"):
        losses.scf(x, x, key=KEY, frequencies=0)
