"""Distances along random lines: sw2, by optimal transport, and scf, by characteristic functions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import clouds, filled, integer, kept_rows, loss, row_mean
from kd2m_jax.losses._groups import everyone
from kd2m_jax.losses._numerics import HIGHEST, centred, magnitude


@loss
def sw2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    *,
    projections: int = 128,
    key: jax.Array | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Squared sliced 2-Wasserstein distance: W2^2 of one-dimensional projections, averaged.

    ``SW2^2 = 1/L sum_l W2^2(<theta_l, z_s>, <theta_l, z_t>)`` over L random unit vectors. In one
    dimension the optimal plan sorts both clouds, so the cost is ``O(L n log n)`` and no solver
    is run. It is a *mean* over directions, and one direction sees 1/d of a squared distance: in
    expectation ``d SW2^2 <= W2^2``, with equality for a translation. Weigh it d times as much
    as `w2`.

    It has no conditional twin: sorting has no mask, and classes of unequal size have no sort in
    common.

    Cost: time O(n (d + log n)) and memory O(n) a projection.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n.
      projections: >= 1, the number L of directions. The estimate's standard error falls as
        ``1 / sqrt(L)``.
      key: a PRNG key, which draws the directions: a new one each step, so that training sees
        them all. Traced, not static.
      where: ``[n]`` bool, the rows that count, for m = n; None for all. A row that does not is
        as if it were not there, on both sides, whatever it holds.

    Returns:
      Scalar, a *squared* distance, float32 (float64 for float64 features). The gradient is that
      of the sorted pairing held constant.

    Raises:
      ValueError: shapes that do not match, projections < 1, no key.
      TypeError: features that are not floating point.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.0], [3.0], [1.0]])  # one dimension: the same as `w2`
      >>> print(f"{sw2(z, z[::-1] + 2.0, key=jax.random.key(0)):.4f}")
      4.0000

    References:
      Rabin, Peyre, Delon & Bernot, SSVM 2011; Bonneel, Rabin, Peyre & Pfister, JMIV 2015.
    """
    z_s, z_t = clouds(z_s, z_t)
    directions = _directions("sw2", z_s, projections, key)
    keep = kept_rows(where, len(z_s), len(z_t))
    z_s, z_t = centred(*filled(keep, z_s, z_t))
    x, y = (jnp.matmul(z, directions, precision=HIGHEST) for z in (z_s, z_t))
    if keep is not None:
        return _between_kept(x, y, keep)
    x, y = jnp.sort(x, axis=0), jnp.sort(y, axis=0)
    i, j, weight = _staircase(x.shape[0], y.shape[0])
    gaps = jnp.mean((x[i] - y[j]) ** 2, axis=1)
    return jnp.sum(jnp.asarray(weight, gaps.dtype) * gaps)


@loss
def scf(
    z_s: ArrayLike,
    z_t: ArrayLike,
    *,
    projections: int = 128,
    frequencies: int = 16,
    key: jax.Array | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Sliced characteristic functions: their squared gap along random lines, averaged.

    ``1/L sum_l sum_k v_k |phi_S,l(t_k) - phi_T,l(t_k)|^2`` over L random unit vectors, with the
    empirical characteristic functions ``phi_S,l(t) = 1/n sum_i exp(i t <theta_l, z_s,i> / s)``.
    This is the statistic of Epps & Pulley between two samples, in O(n) without sorting. Every
    sample has a smooth, bounded pull, and no other one is paired with it.

    The grid is ``t_k = 5 k / F``, k = 1..F, with the weights of the trapezoidal rule on [-5, 5]
    under the standard normal density: ``v_k = (10 / F) exp(-t_k^2 / 2) / sqrt(2 pi)``, the last
    one halved. With the whole integral it would be `mmd` of each line with a Gaussian kernel of
    bandwidth s. The grid repeats that kernel every ``2 pi F s / 5``, 20 s by default: there two
    samples look as near as they ever do.

    ``s^2 = 1/(2 d) (1/n sum_i |z_s,i - c|^2 + 1/m sum_j |z_t,j - c|^2)`` is the mean variance of a
    line about c, the mean of both means. It is a constant for the gradient, and the value does not
    depend on a common scale.

    Cost: time O(n (d + F)) and memory O(n F) per projection, for F frequencies.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n.
      projections: >= 1, the number L of directions.
      frequencies: >= 1, the number F of positive ones in the grid; 8 is that of LeJEPA.
      key: a PRNG key, which draws the directions: a new one each step, so that training sees
        them all. Traced, not static.
      where: ``[n]`` bool, the rows that count, for m = n; None for all. A row that does not is
        as if it were not there, on both sides, whatever it holds.

    Returns:
      Scalar, dimensionless, between 0 and 4, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, projections or frequencies < 1, no key.
      TypeError: features that are not floating point.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> one, other = jnp.array([[-1.0]]), jnp.array([[1.0]])  # two apart, where s is 1
      >>> print(f"{scf(one, other, key=jax.random.key(0)):.4f}")  # 2 - 2 exp(-2)
      1.7293

    References:
      Epps & Pulley, Biometrika 1983. For one sample against a normal distribution: LeJEPA,
      Balestriero & LeCun, arXiv 2511.08544.
    """
    z_s, z_t = clouds(z_s, z_t)
    directions = _directions("scf", z_s, projections, key)
    frequencies = integer("frequencies", frequencies)
    keep = kept_rows(where, len(z_s), len(z_t))
    z_s, z_t = centred(*filled(keep, z_s, z_t))
    size = magnitude(z_s, z_t)  # what is left has squares that are numbers
    z_s, z_t = z_s / size, z_t / size
    spread = sum(row_mean(jnp.mean(z**2, axis=1), keep) for z in (z_s, z_t)) / 2
    spread = jax.lax.stop_gradient(spread)
    unit = jnp.sqrt(jnp.where(spread == 0, 1, spread))  # NaN stays NaN
    step = 5 / frequencies
    t = step * np.arange(1, frequencies + 1)
    weight = 10 / frequencies * np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    weight[-1] /= 2
    groups = everyone(len(z_s), len(z_t), z_s.dtype, keep)

    def parts(z: jax.Array, share: jax.Array) -> jax.Array:
        """``[2 F, L]``, the characteristic functions' real and imaginary parts."""
        lines = jnp.matmul(z / unit, directions, precision=HIGHEST)
        waves = jnp.concatenate(_multiples(step * lines, frequencies))
        return jnp.sum(share[None, :, None] * waves, axis=1)

    gaps = parts(z_s, groups.weight_s) - parts(z_t, groups.weight_t)
    weight = jnp.asarray(np.tile(weight, 2), gaps.dtype)
    return jnp.sum(weight * jnp.mean(gaps**2, axis=1))


def _multiples(angles: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine of 1 to ``count`` times the angles, ``[count, ...]`` each.

    By doubling, so that each is computed once: `scf` takes 5 to 8 ms of CPU time with its gradient
    instead of 15 to 22 (n = 128, two cores).
    """
    cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
    while len(cos) < count:
        c, s = cos[-1:], sin[-1:]
        cos, sin = (
            jnp.concatenate([cos, c * cos - s * sin]),
            jnp.concatenate([sin, s * cos + c * sin]),
        )
    return cos[:count], sin[:count]


def _directions(name: str, z: jax.Array, projections: int, key: jax.Array | None) -> jax.Array:
    """Return random unit vectors, ``[d, projections]``."""
    projections = integer("projections", projections)
    if key is None:
        raise ValueError(f"{name} draws random directions: give it a key, jax.random.key(0) say")
    # Drawn in float32 whatever the features are: one key, the same directions.
    drawn = jax.random.normal(key, (z.shape[1], projections), jnp.float32).astype(z.dtype)
    return drawn / jnp.linalg.norm(drawn, axis=0, keepdims=True)


def _between_kept(x: jax.Array, y: jax.Array, keep: jax.Array) -> jax.Array:
    """Return the mean squared gap between sorted columns, of the rows that count."""
    # The others are sorted to the end, so as many of both sides come before it.
    x, y = (jnp.sort(jnp.where(keep[:, None], z, jnp.inf), axis=0) for z in (x, y))
    count = jnp.sum(keep)
    counts = (jnp.arange(len(keep)) < count)[:, None]
    gaps = jnp.where(counts, x, 0) - jnp.where(counts, y, 0)
    return jnp.sum(jnp.mean(gaps**2, axis=1)) / jnp.maximum(count, 1)


def _staircase(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the plan between n and m sorted points: rows i, columns j, masses; at most n + m - 1.

    Both quantile functions are constant between two neighbours of ``{k/n} u {k/m}``. In units
    of 1/(n m) those levels are whole numbers, so no mass is lost to rounding; n = m gives the
    identity.
    """
    levels = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    return levels[:-1] // m, levels[:-1] // n, np.diff(levels) / (n * m)
