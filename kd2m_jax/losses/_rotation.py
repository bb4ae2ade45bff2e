"""The rotation of a teacher's space that brings its classes onto the student's.

``max_Q max_P sum_ij P_ij <x_i, y_j Q>`` over orthogonal Q and couplings P within classes, where
both clouds are seen from the mean of their class means. Given P, the best Q is the polar factor of
``Y^T P^T X``; given Q, P is the distance's own. One after the other, from the class means, whose
pairing is known: a local optimum.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd2m_jax.losses._checks import varying
from kd2m_jax.losses._groups import Groups
from kd2m_jax.losses._numerics import HIGHEST
from kd2m_jax.losses._polar import by_platform

_dot = functools.partial(jnp.matmul, precision=HIGHEST)
# Class means that differ by less, relative to both clouds' sizes, give no direction.
NO_DIRECTION = 1e-5
# A coupling that is weaker is left open: float32's rounding of features couples by 1e-8 to 1e-7.
NEGLIGIBLE = 1e-6


def turned(
    z_s: jax.Array,
    z_t: jax.Array,
    groups: Groups,
    coupled: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Both clouds seen from their centres, the teacher's turned onto the student's.

    Centres and rotation are constants for the gradient. They are optimal for the coupling, so to
    first order they do not move (envelope theorem).

    Args:
      z_s: ``[n, d]``.
      z_t: ``[m, d]``.
      groups: the classes.
      coupled: from rows X, Y centred by class, and a matrix whose polar factor is a start Q, to
        ``P^T X``, ``[m, d]``, for the coupling P of X and Y Q.
    """
    # Seen from one of them, equal rows are zeros, which a mean that is rounded does not give.
    z_s, z_t = (z - jax.lax.stop_gradient(z[:1]) for z in (z_s, z_t))
    x, y = jax.lax.stop_gradient((z_s, z_t))
    weight_s, weight_t = groups.weight_s[:, None], groups.weight_t[:, None]
    centre_s, centre_t = (
        jnp.sum(weight * z, axis=0, keepdims=True) for weight, z in ((weight_s, x), (weight_t, y))
    )
    x, y = x - centre_s, y - centre_t
    mean_s, mean_t = groups.mean_s(x), groups.mean_t(y)
    between = _dot(groups.mean_t_at_s(y).T, weight_s * mean_s)
    size = jnp.sqrt(jnp.sum(weight_s * x**2)) * jnp.sqrt(jnp.sum(weight_t * y**2))
    x, y = groups.kept_s(x - mean_s), groups.kept_t(y - mean_t)
    turn = rotation(between, size, lambda start: _dot(y.T, coupled(x, y, start)))
    return z_s - centre_s, _dot(z_t - centre_t, turn)


def rotation(
    between: jax.Array, size: jax.Array, within: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Return Q ``[d, d]``, orthogonal, by which the teacher's rows are multiplied from the right.

    Args:
      between: ``[d, d]``, ``sum_y w_y m_T,y^T m_S,y`` of the class means.
      size: the product of both clouds' weighted lengths, the unit.
      within: from a matrix whose polar factor is a start to ``Y^T P^T X`` of rows centred by class.
    """
    size = jnp.where(size == 0, 1, size)  # NaN stays NaN
    # The start is the polar factor of between, without directions below NO_DIRECTION: K classes
    # give K - 1. The others stay out: any rotation of them would do, and a coupling by one of those
    # is chance. It led to a Gaussian distance of 4 to 5 instead of 0.35 (400 samples of 10 classes,
    # 64 features, the same ones with a little noise, turned).
    matched = isometry((between + within(between / size)) / size, NEGLIGIBLE)
    return completed(matched)


def completed(p: jax.Array) -> jax.Array:
    """Return an orthogonal matrix that is p where p is not 0, a partial isometry.

    Else as near the identity as may be. Where that is open as well, because what is open on one
    side lies across what is open on the other, it is turned to a fixed symmetric matrix, so that
    the transpose is completed to the transpose.
    """
    one = jnp.eye(len(p), dtype=p.dtype)
    # cos(ij): symmetric, and no direction is across its image by accident. Its norm is below 1.
    index = jnp.arange(1, len(p) + 1, dtype=p.dtype)
    anyhow = jnp.cos(index[:, None] * index[None, :]) / (2 * len(p) ** 0.5)

    def is_open(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        attempts, p = state  # p's squared norm is its rank
        return (attempts < 2) & (jnp.sum(p**2) < len(p) - 0.5)

    def turn_what_is_open(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        attempts, p = state
        towards = jnp.where(attempts == 0, one, anyhow)
        left_open = _dot(_dot(one - _dot(p, p.T), towards), one - _dot(p.T, p))
        return attempts + 1, isometry(p + left_open, NEGLIGIBLE)

    # One more decomposition only where there is something open, a second one hardly ever.
    start = varying(jnp.zeros((), jnp.int32), like=p)
    return jax.lax.while_loop(is_open, turn_what_is_open, (start, p))[1]


def isometry(c: jax.Array, least: float) -> jax.Array:
    """Return the polar factor, without singular values below ``least``, as one matrix."""

    def product(polar: Callable, c: jax.Array) -> jax.Array:
        left, right = varying(polar(c, least), like=c)
        return _dot(left, right.T)

    return by_platform(product, c)
