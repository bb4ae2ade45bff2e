"""Optimal transport along random lines: sw2."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import clouds, filled, integer, kept_rows, loss
from kd2m_jax.losses._numerics import HIGHEST, centred


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
    projections = integer("projections", projections)
    if key is None:
        raise ValueError("sw2 draws random directions: give it a key, jax.random.key(0) say")
    keep = kept_rows(where, len(z_s), len(z_t))
    z_s, z_t = centred(*filled(keep, z_s, z_t))
    # Drawn in float32 whatever the features are: one key, the same directions.
    directions = jax.random.normal(key, (z_s.shape[1], projections), jnp.float32).astype(z_s.dtype)
    directions /= jnp.linalg.norm(directions, axis=0, keepdims=True)
    x, y = (jnp.matmul(z, directions, precision=HIGHEST) for z in (z_s, z_t))
    if keep is not None:
        return _between_kept(x, y, keep)
    x, y = jnp.sort(x, axis=0), jnp.sort(y, axis=0)
    i, j, weight = _staircase(x.shape[0], y.shape[0])
    gaps = jnp.mean((x[i] - y[j]) ** 2, axis=1)
    return jnp.sum(jnp.asarray(weight, gaps.dtype) * gaps)


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
