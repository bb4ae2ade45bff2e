"""Kernels over pairs of rows, by matrix products: what MMD sums, without what cancels in it.

Row i of both clouds is usually the same example, so with ``delta = x - y`` the four kernel values
of rows i and j differ by little near equality. Their sum
``k(x_i, x_j) - k(x_i, y_j) - k(y_i, x_j) + k(y_i, y_j)`` is taken here from products with delta,
to its own digits. For unrelated rows it is the same sum.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kd2m_jax.losses._numerics import HIGHEST, safe_sqrt

_dot = functools.partial(jnp.matmul, precision=HIGHEST)


def polynomial_pairs(x: jax.Array, delta: jax.Array, degree: int, offset: float) -> jax.Array:
    """Return the sum for ``(x . y + offset)^degree``, ``[n, n]``, by a recurrence over the degree.

    With the four bases A, B, C, D and ``A - B - C + D = g``: nothing of the size of the bases,
    which a large common part of the features makes large, is subtracted.
    """
    a, g = _dot(x, delta.T), _dot(delta, delta.T)  # A - B
    b, base_a = a.T, _dot(x, x.T) + offset  # A - C
    base_b, base_c, base_d = base_a - a, base_a - b, base_a - a - b + g
    total = from_b = from_c = jnp.zeros_like(base_a)
    power_d = jnp.ones_like(base_a)
    for _ in range(degree):  # of A^k - B^k - C^k + D^k, B^k - D^k, C^k - D^k and D^k
        total = base_a * total + a * from_b + b * from_c + g * power_d
        from_b = base_b * from_b + (b - g) * power_d
        from_c = base_c * from_c + (a - g) * power_d
        power_d = base_d * power_d
    return total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def distance_pairs(kernel: str, x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum "rbf", ``exp(-|x - y|^2)``, or "energy", ``-|x - y|``, over weighted pairs.

    ``weight`` is a number or a symmetric ``[n, n]``.
    """
    return jnp.sum(weight * PAIRS[kernel](*_squares(kernel, x, y, weight)))


@functools.partial(distance_pairs.defjvp, symbolic_zeros=True)
def _(kernel, primals, tangents):
    x, y, weight = primals
    squares = _squares(kernel, x, y, weight)
    # Of k = f(|x - y|^2): 4 sum_j w [f'_xx (x_i - x_j) - f'_xy (x_i - y_j)], and likewise for y,
    # where x_i - y_j = (x_i - x_j) + delta_j.
    xx, xy, yy = (weight * slope for slope in SLOPES[kernel](*squares[:3]))
    delta, slope = x - y, jnp.zeros((), x.dtype)
    if not isinstance(tangents[0], SymbolicZero):
        slope += 4 * jnp.sum((_spread(xx - xy, x) - _dot(xy, delta)) * tangents[0])
    if not isinstance(tangents[1], SymbolicZero):
        slope += 4 * jnp.sum((_spread(yy - xy.T, y) + _dot(xy.T, delta)) * tangents[1])
    return jnp.sum(weight * PAIRS[kernel](*squares)), slope


def _spread(slopes: jax.Array, z: jax.Array) -> jax.Array:
    """``sum_j slopes_ij (z_i - z_j)``."""
    return jnp.sum(slopes, axis=1, keepdims=True) * z - _dot(slopes, z)


def _squares(kernel: str, x: jax.Array, y: jax.Array, weight: jax.Array):
    """Squared distances within x, from x to y and within y; what they are made of.

    By products, unless rounding shows in the kernel there: then by differences, which take ten
    times as long. The last two are ``|x_i - y_j|^2 - |x_i - x_j|^2`` and ``delta_i . delta_j``.
    """
    delta = x - y
    inner, cross, moved = _dot(x, x.T), _dot(x, delta.T), _dot(delta, delta.T)
    norm, diagonal = jnp.diag(inner), jnp.eye(len(x), dtype=bool)
    xx = norm[:, None] + norm[None, :] - 2 * inner
    xx = jnp.where(diagonal, 0 * xx, xx)  # NaN stays NaN
    a = 2 * (cross - jnp.diag(cross)[None, :]) + jnp.diag(moved)[None, :]
    expanded = xx, xx + a, xx + a + a.T - 2 * moved
    norms = norm, jnp.sum(y**2, axis=1)
    if kernel == "rbf":  # an error in the exponent
        rounding = 8 * jnp.finfo(x.dtype).eps * jnp.maximum(*(jnp.max(n) for n in norms))
        clear = rounding < 1e-5
    else:  # an error of the root, relative to it
        sizes = [p[:, None] + q[None, :] for p, q in ((norms[0],) * 2, norms, (norms[1],) * 2)]
        used = (weight > 0) & ~diagonal
        ratios = [jnp.where(used & (s > 0), e / s, 1) for e, s in zip(expanded, sizes, strict=True)]
        clear = functools.reduce(jnp.minimum, map(jnp.min, ratios)) > 1e-3
    pairs = (x, x), (x, y), (y, y)
    exact = lambda: tuple(exact_squares(*pair) for pair in pairs)  # noqa: E731
    values = jax.lax.stop_gradient(jax.lax.cond(clear, lambda: expanded, exact))
    return *with_slope_of(expanded, values), a, moved


@jax.custom_jvp
def with_slope_of(tree: Any, values: Any) -> Any:
    """Return the values, with the derivative of the tree that they are a better form of."""
    del tree
    return values


@with_slope_of.defjvp
def _(primals, tangents):
    return with_slope_of(*primals), tangents[0]


def exact_squares(x: jax.Array, y: jax.Array) -> jax.Array:
    """``[n, m]`` squared distances from differences; no ``[n, m, d]`` array is made."""
    # The barrier keeps XLA from sharing one cloud's broadcast among several blocks: in memory.
    x, y = jax.lax.optimization_barrier((x, y))
    return jnp.sum((x[:, None, :] - y[None, :, :]) ** 2, axis=2)


def _rbf(xx: jax.Array, xy: jax.Array, yy: jax.Array, a: jax.Array, moved: jax.Array) -> jax.Array:
    near = (jnp.abs(a) < 0.5) & (jnp.abs(a.T) < 0.5) & (jnp.abs(moved) < 0.25)
    u = _expm1_near(jnp.where(near, -a, 0))
    little = u * u.T + (1 + u) * (1 + u.T) * _expm1_near(jnp.where(near, 2 * moved, 0))
    # Far rows do not cancel, and their parts may only meet in the exponent.
    here, there = jnp.exp(-xx), jnp.exp(-xy)
    return jnp.where(near, here * little, here - there - there.T + jnp.exp(-yy))


def _expm1_near(x: jax.Array) -> jax.Array:
    """``exp(x) - 1`` for ``|x| <= 1/2``, by a series faster than the library's."""
    terms = 1.0
    for k in range(8 if x.dtype == jnp.float32 else 15, 1, -1):
        terms = 1 + x * (1 / k) * terms
    return x * terms


def _energy(xx: jax.Array, xy: jax.Array, yy: jax.Array, a: jax.Array, moved: jax.Array):
    r_xx, r_xy, r_yy = _roots(xx, xy, yy)
    diagonal = jnp.eye(len(a), dtype=bool)
    one = lambda r: jnp.where((r > 0) & ~diagonal, r, 1)  # noqa: E731
    # A difference of roots is that of the squares over their sum, twice.
    turn = a.T / one(r_xy.T + r_xx) + (a.T - 2 * moved) / one(r_yy + r_xy)
    pairs = (a * turn / one(r_xy + r_xx) + 2 * moved) / one(r_xy.T + r_yy)
    return jnp.where(diagonal, r_xy + r_xy.T, pairs)


def _roots(*squares: jax.Array) -> list[jax.Array]:
    return [safe_sqrt(jnp.maximum(s, 0 * s)) for s in squares]  # NaN stays NaN


def _rbf_slopes(*squares: jax.Array) -> list[jax.Array]:
    return [-jnp.exp(-s) for s in squares]


def _energy_slopes(*squares: jax.Array) -> list[jax.Array]:
    # Points that coincide do not move one another.
    return [-jnp.where(r > 0, 0.5 / jnp.where(r > 0, r, 1), 0) for r in _roots(*squares)]


PAIRS: dict[str, Callable] = {"rbf": _rbf, "energy": _energy}
SLOPES: dict[str, Callable] = {"rbf": _rbf_slopes, "energy": _energy_slopes}
