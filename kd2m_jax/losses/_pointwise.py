"""Losses that compare each example's features with its own: l2."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import clouds, loss


@loss
def l2(z_s: ArrayLike, z_t: ArrayLike) -> jax.Array:
    r"""Mean squared Euclidean distance between paired features.

    ``1/n sum_i ||z_s,i - z_t,i||^2``: the cost of pairing each example with itself, so an upper
    bound of `w2` and `cw2`.

    Cost: O(n d).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples.

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
    return jnp.mean(jnp.sum((z_s - z_t) ** 2, axis=1))
