"""The generalisation bound behind distribution matching, measured on features."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import clouds, loss, number
from kd2m_jax.losses._groups import everyone
from kd2m_jax.losses._solvers import exact_plan

__all__ = ["Bound", "bound"]


class Bound(NamedTuple):
    """What `bound` measures: ``gap <= w <= l2``, then the quantities beside that chain.

    All are float scalars and distances, *not* squared. The first four live in the kernel's
    space H, where features phi(z) have norm 1; the last two in the space of the features.

    Attributes:
      gap: ``|R_S(loss) - R_T(loss)|``, the risk gap of the loss of unit norm in H for which it
        is largest, the witness of the MMD.
      w: the 1-Wasserstein distance whose ground cost is the distance in H.
      l2: the root of the mean squared distance in H between the two features of an example.
      mmd: the maximum mean discrepancy; in exact arithmetic it is ``gap``.
      euclidean_w2: the 2-Wasserstein distance between features, root of the exact `w2`.
      euclidean_l2: the root of `kd2m_jax.losses.l2`. At least ``euclidean_w2`` always, and at
        least ``l2`` if bandwidth >= 1.
    """

    gap: jax.Array
    w: jax.Array
    l2: jax.Array
    mmd: jax.Array
    euclidean_w2: jax.Array
    euclidean_l2: jax.Array


@loss
def bound(z_s: ArrayLike, z_t: ArrayLike, *, bandwidth: float) -> Bound:
    r"""Measure the theorem's chain ``|R_S(loss) - R_T(loss)| <= W <= L2`` on one batch.

    It holds for losses of unit norm in the Hilbert space H of a bounded kernel, here
    ``k(x, y) = exp(-||x - y||^2 / (2 bandwidth^2)) = <phi(x), phi(y)>``, and reads

    - ``gap = |mean_i h(z_s,i) - mean_i h(z_t,i)|`` with the unit-norm witness
      ``h = (mean_i phi(z_s,i) - mean_i phi(z_t,i)) / MMD``: no loss of unit norm has a larger gap;
    - ``w = min_P sum_ij P_ij ||phi(z_s,i) - phi(z_t,j)||``: ``<., h>`` is 1-Lipschitz there;
    - ``l2 = (mean_i ||phi(z_s,i) - phi(z_t,i)||^2)^1/2``: pairing each example with itself is one
      feasible P, and a mean is at most a root mean square.

    With bandwidth >= 1 phi is 1-Lipschitz, and ``l2 <= euclidean_l2``; below 1 that last
    inequality is not promised. The chain says nothing of the cross-entropy of a real classifier,
    which has no unit norm in H, nor of a Sinkhorn cost, which may exceed the L2 distance.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples.
      bandwidth: > 0, in the unit of the features.

    Returns:
      A `Bound` of six distances, none squared, float32 (float64 for float64 features). A
      measurement, not a loss: gradients at coincident points are not finite. In float32 those
      in H, where 1 is the norm of a feature, hold to about 3e-4.

    Raises:
      ValueError: shapes that differ, bandwidth <= 0.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z_t = jnp.array([[0.0], [1.0], [2.0]])
      >>> chain = bound(z_t[::-1] + 0.5, z_t, bandwidth=1.0)
      >>> values = chain.gap, chain.w, chain.l2, chain.euclidean_l2
      >>> print(" <= ".join(f"{value:.3f}" for value in values))
      0.243 <= 0.485 <= 1.080 <= 1.708

    References:
      Fernandes Montesuma, KD2M, GSI 2025; the inequality in H is that of Redko, Habrard & Sebban,
      ECML PKDD 2017. Witness: Gretton et al., JMLR 2012.
    """
    z_s, z_t = clouds(z_s, z_t, paired=True)
    number("bandwidth", bandwidth)
    squared = _squared_distances(z_s, z_t)
    cross, within_s, within_t = (
        d / (2 * bandwidth**2)
        for d in (squared, _squared_distances(z_s, z_s), _squared_distances(z_t, z_t))
    )
    k, k_s, k_t = jnp.exp(-cross), jnp.exp(-within_s), jnp.exp(-within_t)
    # Differences of kernels first: entry by entry they are small when student and teacher agree,
    # and exactly zero when they are equal.
    mmd = jnp.sqrt(jnp.maximum(jnp.mean((k_s - k) + (k_t - k.T)), 0))
    witness_s = jnp.mean(k_s - k, axis=1)
    witness_t = jnp.mean(k.T - k_t, axis=1)
    gap = jnp.abs(jnp.mean(witness_s) - jnp.mean(witness_t)) / jnp.where(mmd > 0, mmd, 1)
    # ||phi(x) - phi(y)||^2 = 2 - 2 k(x, y), without losing the digits of small distances.
    distance = jnp.sqrt(-2 * jnp.expm1(-cross))
    groups = everyone(z_s.shape[0], z_t.shape[0], z_s.dtype)
    w, w2 = (jnp.sum(exact_plan(cost, groups).coupling * cost) for cost in (distance, squared))
    return Bound(
        gap=gap,
        w=w,
        l2=jnp.sqrt(jnp.mean(jnp.diag(distance) ** 2)),
        mmd=mmd,
        euclidean_w2=jnp.sqrt(w2),
        euclidean_l2=jnp.sqrt(jnp.mean(jnp.diag(squared))),
    )


def _squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """``[n, m]``, by differences: the root of a rounding error would break the chain."""
    return jax.lax.map(lambda row: jnp.sum((row[None, :] - y) ** 2, axis=1), x)
