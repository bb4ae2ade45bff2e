"""What it costs to move a student's sample to a teacher's: the costs of w2, cw2 and jw2.

Each comes in the three forms that solvers take: as a matrix, between pairs that are chosen
already, and as one product that is enough to choose them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd2m_jax.losses._groups import Groups
from kd2m_jax.losses._numerics import HIGHEST, squared_distances

LABEL_COSTS = ("cross_entropy", "kl", "sqeuclidean")


class PairCost(NamedTuple):
    """A cost between the samples of two clouds x and y (arrays, or tuples of arrays).

    Attributes:
      matrix: ``(x, y) -> [n, m]``, all pairs; rounding may leave entries below zero.
      pairs: ``(x, y) -> [n]``, row i with row i, by differences: no cancellation.
      factors: ``(x, y) -> left [n, k], right [m, k]`` such that ``-left @ right.T`` is the matrix
        up to a positive factor and to what a row or a column has in common within a group. That
        does not change which pairing is the best, and without it no norms are needed, whose
        rounding would hide the differences of a cloud that collapsed to almost a point.
    """

    matrix: Callable[[Any, Any], jax.Array]
    pairs: Callable[[Any, Any], jax.Array]
    factors: Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def between_features(groups: Groups) -> PairCost:
    """``||x_i - y_j||^2``."""

    def matrix(x, y):
        if groups.same is not None:
            # Only distances within a class count, and a tight class may lie far from the others.
            centre = jax.lax.stop_gradient((groups.mean_s(x) + groups.mean_t_at_s(y)) / 2)
            x, y = x - centre, y - groups.at_t(centre)
        return squared_distances(x, y)

    def factors(x, y):
        return x - groups.middle(x), y - groups.middle(y)

    return PairCost(matrix, lambda x, y: jnp.sum((x - y) ** 2, axis=1), factors)


def between_features_and_logits(groups: Groups, beta: float, label_cost: str) -> PairCost:
    """``||z_i - z'_j||^2 + beta L(h_i, h'_j)`` for clouds of features and logits ``(z, h)``."""
    features = between_features(groups)

    def matrix(x, y):
        (z, logits), (other_z, other_logits) = x, y
        labels = label_costs(logits, other_logits, label_cost)
        return squared_distances(z, other_z) + beta * labels

    def pairs(x, y):
        (z, logits), (other_z, other_logits) = x, y
        return features.pairs(z, other_z) + beta * _paired(logits, other_logits, label_cost)

    def factors(x, y):
        (z, logits), (other_z, other_logits) = x, y
        weight = beta  # of one product of features: half of what it is in the cost
        if label_cost != "sqeuclidean":
            logits, other_logits = jax.nn.log_softmax(logits), jax.nn.softmax(other_logits)
            weight = beta / 2
        parts = features.factors(z, other_z), features.factors(weight * logits, other_logits)
        left, right = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return left, right

    return PairCost(matrix, pairs, factors)


def label_costs(logits_s: jax.Array, logits_t: jax.Array, kind: str) -> jax.Array:
    """``[n, m]``, how much student prediction i disagrees with teacher prediction j."""
    if kind == "sqeuclidean":
        return squared_distances(logits_s, logits_t)
    log_s, log_t = jax.nn.log_softmax(logits_s), jax.nn.log_softmax(logits_t)
    p_t = jnp.exp(log_t)
    cost = -jnp.matmul(log_s, p_t.T, precision=HIGHEST)
    # log_softmax is finite, so p log p is 0 where p underflows. An infinite logit makes it NaN,
    # in the cross-entropy too, which alone would take the teacher's -inf for a probability.
    negentropy = jnp.sum(p_t * log_t, axis=1)[None, :]
    return cost + (0 * negentropy if kind == "cross_entropy" else negentropy)


def _paired(logits_s: jax.Array, logits_t: jax.Array, kind: str) -> jax.Array:
    """``[n]``, the same between row i of both."""
    if kind == "sqeuclidean":
        return jnp.sum((logits_s - logits_t) ** 2, axis=1)
    log_s, log_t = jax.nn.log_softmax(logits_s), jax.nn.log_softmax(logits_t)
    # As above: for the cross-entropy the teacher's part is there for its NaN alone.
    log_t_part = 0 * log_t if kind == "cross_entropy" else log_t
    return jnp.sum(jnp.exp(log_t) * (log_t_part - log_s), axis=1)
