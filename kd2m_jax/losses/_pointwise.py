"""Losses that compare each example's features with its own: l2."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import clouds, emptied, kept_rows, loss, row_mean


@loss
def l2(z_s: ArrayLike, z_t: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    r"""Mean squared Euclidean distance between paired features.

    ``1/n sum_i ||z_s,i - z_t,i||^2``: the cost of pairing each example with itself, so an upper
    bound of `w2` and `cw2`.

    Cost: O(n d).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

    Returns:
      Scalar, a *squared* distance, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that differ.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> print(l2(jnp.ones((4, 3)), jnp.zeros((4, 3))))
      3.0

    References:
      FitNets (Romero et al., ICLR 2015), on penultimate features.
    """
    z_s, z_t = clouds(z_s, z_t, paired=True)
    keep = kept_rows(where, len(z_s), len(z_t))
    z_s, z_t = emptied(keep, z_s, z_t)
    return row_mean(jnp.sum((z_s - z_t) ** 2, axis=1), keep)
