"""The polar factor behind the full-covariance Gaussian distances: who is matched with whom.

``P`` is the partial isometry that attains ``||K||_* = max <P, K>`` over contractions, for
``K = (X Y^T) o M``. It plays the part that the coupling plays in optimal transport.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd2m_jax.losses._checks import varying
from kd2m_jax.losses._groups import Groups
from kd2m_jax.losses._numerics import HIGHEST, in_double

_dot = functools.partial(jnp.matmul, precision=HIGHEST)
# A pairing that is weaker, in the directions of a start, is rounding of the rows' other directions.
ROUNDING = {"float64": 1e-10, "float32": 1e-4}


@jax.custom_jvp
def unmatched(x: jax.Array, y: jax.Array, groups: Groups) -> jax.Array:
    """``||X||^2 + ||Y||^2 - 2 ||(X Y^T) o M||_*`` of rows that are centred by group.

    Computed as ``||X - P Y||^2 + ||Y - P^T P Y||^2``, where nothing cancels: each feature is
    right to its own scale, however large the others are.
    """
    left, right = factors(x, y, groups)
    to_x = _dot(left, _dot(right.T, y))
    rest = y - _dot(right, _dot(left.T, to_x))
    return jnp.sum((x - to_x) ** 2) + jnp.sum(rest**2)


@unmatched.defjvp
def _(primals, tangents):
    x, y, groups = primals
    # P is optimal, so to first order it is a constant; to second order it is not.
    to_x, to_y = _matched(x, y, groups)
    slope = jnp.sum((x - to_x) * tangents[0]) + jnp.sum((y - to_y) * tangents[1])
    return unmatched(x, y, groups), 2 * slope


@jax.custom_jvp
def _matched(x: jax.Array, y: jax.Array, groups: Groups) -> tuple[jax.Array, jax.Array]:
    """``P Y`` and ``P^T X``."""
    left, right = factors(x, y, groups)
    return _dot(left, _dot(right.T, y)), _dot(right, _dot(left.T, x))


@_matched.defjvp
def _(primals, tangents):
    """Return the polar factor's derivative, for ``K = U S V^T`` without its null vectors.

    ``dP = U [(G - G^T)_ij / (s_i + s_j)] V^T + (1 - U U^T) dK V S^-1 V^T
    + U S^-1 U^T dK (1 - V V^T)`` with ``G = U^T dK V``.
    """
    (x, y, groups), (dx, dy, _) = primals, tangents
    u, s, v = _singular(x, y, groups)
    if groups.same is None:
        dk_v = _dot(dx, _dot(y.T, v)) + _dot(x, _dot(dy.T, v))
        dkt_u = _dot(dy, _dot(x.T, u)) + _dot(y, _dot(dx.T, u))
    else:
        dk = groups.within(_dot(dx, y.T) + _dot(x, dy.T))
        dk_v, dkt_u = _dot(dk, v), _dot(dk.T, u)
    g = _dot(u.T, dk_v)
    signal = s > 0
    inverse = jnp.where(signal, 1 / jnp.where(signal, s, 1), 0)[None, :]
    both = signal[:, None] & signal[None, :]
    turn = jnp.where(both, (g - g.T) / jnp.where(both, s[:, None] + s[None, :], 1), 0)
    out_u, out_v = (dk_v - _dot(u, g)) * inverse, (dkt_u - _dot(v, g.T)) * inverse
    u_x, v_y = _dot(u.T, x), _dot(v.T, y)
    d_to_x = _dot(u, _dot(turn, v_y) + _dot(out_v.T, y) + _dot(v.T, dy)) + _dot(out_u, v_y)
    d_to_y = _dot(v, _dot(turn.T, u_x) + _dot(out_u.T, x) + _dot(u.T, dx)) + _dot(out_v, u_x)
    return _matched(x, y, groups), (d_to_x, d_to_y)


def factors(x: jax.Array, y: jax.Array, groups: Groups) -> tuple[jax.Array, jax.Array]:
    """``L`` and ``R`` with ``P = L R^T``, without the directions where K is rounding.

    Centring leaves null vectors, whose directions are noise that depends on the batch's order.

    In float64 inside, whatever the features are: K has the squares of their scales, and float32
    loses a feature at 1e-3 of the largest.
    """
    return by_platform(_factors, x, y, groups)


def by_platform(function: Callable, *given):
    """Return ``function(polar, *given)``, with the way to polar factors that suits the platform.

    On the CPU the SVD (one core, n = 128 and 512: 2.2 and 84 ms; 1.4 and 45 in float32). On GPUs,
    where an SVD is a long chain of small kernels, matrix products. Both in float64, the whole
    function: what is exactly 0 for an SVD is float64's rounding for products, which float32 would
    lift above the tolerance of a polar factor that follows. Elsewhere (TPUs emulate float64) the
    same products in float32.
    """
    double = in_double(functools.partial(function, by_products))
    return jax.lax.platform_dependent(
        *given,
        cpu=in_double(functools.partial(function, by_svd)),
        cuda=double,
        rocm=double,
        default=functools.partial(function, by_products),
    )


def _factors(polar: Callable, x, y, groups: Groups, least: float | None = None):
    bases, k, scale = _scaled(x, y, groups)
    pair = varying(polar(k / scale[:, None], least or tolerance(k)), like=k)
    left, right = (f if q is None else _dot(q, f) for q, f in zip(bases, pair, strict=True))
    return left, right


def factors_within(
    c: jax.Array, least: float, x: jax.Array, y: jax.Array, groups: Groups
) -> tuple[jax.Array, jax.Array]:
    """`factors` of rows seen in the directions alone that a matrix pairs.

    Args:
      c: ``[d, d]``, of norm at most 1: the start is its polar factor ``L R^T``, and X stands in
        ``X R``, Y in ``Y L``.
      least: singular values of c below are none.
      x: ``[n, d]``.
      y: ``[m, d]``.
      groups: the classes.
    """

    def function(polar, c, x, y, groups):
        left, right = varying(polar(c, least), like=c)
        x, y = _seen(x, right), _seen(y, left)
        return _factors(polar, x, y, groups, ROUNDING[c.dtype.name])

    return by_platform(function, c, x, y, groups)


def _seen(z: jax.Array, directions: jax.Array) -> jax.Array:
    """Rows in some directions, those that lie outside of them 0: the rest of them is rounding."""
    inside = _dot(z, directions)
    left_out = jnp.sum(inside**2, 1, keepdims=True) <= 1e-12 * jnp.sum(z**2, 1, keepdims=True)
    return jnp.where(left_out, 0, inside)


def _scaled(x: jax.Array, y: jax.Array, groups: Groups):
    """Bases of both clouds, K in them, and the scale of each row's group that makes it 1.

    One group has at most d directions: with ``X = Q R``, K is ``Q (R Y^T)``. A mask does not
    commute with Q, so classes stay at n x n, where a basis is None.
    """
    bases: list = [None, None]
    if groups.same is None:
        pairs = [_coordinates(z) if z.shape[0] > z.shape[1] else (None, z) for z in (x, y)]
        bases, (x, y) = [q for q, _ in pairs], [r for _, r in pairs]
    k = groups.within(_dot(x, y.T))
    # Classes may differ in scale by orders of magnitude: bring each block's norm to at most 1,
    # so that one tolerance tells rounding from signal in all of them.
    norm_x, norm_y = (jnp.sum(z**2, axis=1) for z in (x, y))
    scale = jnp.sqrt(groups.total_s(norm_x)) * jnp.sqrt(groups.total_t_at_s(norm_y))
    scale = jnp.where(scale > 0, scale, 1)
    # Then close to 1: where it is n times smaller, what the tolerance cuts off is a part of the
    # value (0.5% at n = 1,024, d = 2,048). Below 1 / sqrt(n) K may be nothing but rounding.
    size = jnp.sqrt(groups.total_s(jnp.sum((k / scale[:, None]) ** 2, axis=1)))
    return bases, k, scale * jnp.maximum(size, len(k) ** -0.5)


def _coordinates(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``Z = Q R`` with orthonormal columns in Q (or zeros, where Z lacks rank), n > d.

    In float64 from the eigenvectors of ``Z^T Z`` (the whole loss takes 37 ms so, and 82 by
    Householder reflections: n = 4,096, d = 128, one core); of features of length 1, so that small
    ones keep their digits.
    """
    if z.dtype == jnp.float32:
        return jnp.linalg.qr(z)
    length = jnp.sqrt(jnp.sum(z**2, axis=0, keepdims=True))
    length = jnp.where(length > 0, length, 1)
    z = z / length
    values, vectors = jnp.linalg.eigh(_dot(z.T, z))
    # Their own rounding is some 1e-15, and a direction below 3e-7 was none of float32 features.
    rank = values > 1e-13 * values[-1:]
    root = jnp.sqrt(jnp.where(rank, values, 1))[None, :]
    q = _dot(z, vectors * jnp.where(rank[None, :], 1 / root, 0))
    return q, (vectors * jnp.where(rank[None, :], root, 0)).T * length


def tolerance(k: jax.Array) -> float:
    """Singular values below are rounding, of a matrix of norm at most 1."""
    return 4 * float(jnp.finfo(k.dtype).eps) * max(k.shape) ** 0.5


def by_svd(k: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """``U`` and ``V``, the null vectors replaced by 0."""
    u, s, vt = jnp.linalg.svd(k, full_matrices=False)
    keep = (s > tolerance)[None, :].astype(k.dtype)
    return u * keep, vt.T * keep


def by_products(k: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """Newton-Schulz twice: K = P H, then P without the directions where H is below tolerance.

    Each step takes a singular value s to ``s (3 - s^2) / 2``. Before it, as long as there are small
    ones, all are multiplied by 1.6: a small one grows to 2.4 times itself instead of 1.5 times, and
    none that is above 0.35 falls below.
    """
    if k.shape[0] < k.shape[1]:
        left, right = by_products(k.T, tolerance)
        return right, left
    growing = math.ceil(math.log(1 / tolerance, 2.4))

    def to_ones(p):
        def step(i, p):
            p = jnp.where(i < growing, 1.6, 1.0).astype(p.dtype) * p
            return 1.5 * p - 0.5 * _dot(p, _dot(p.T, p))

        return jax.lax.fori_loop(0, growing + 8, step, p)

    p = to_ones(k)
    h = _dot(p.T, k)
    one = jnp.eye(len(h), dtype=h.dtype)
    sign = to_ones((h + h.T) / 2 - tolerance * one)
    # Twice: once leaves up to 1e-4 of a direction that is dropped, in float32.
    kept = (one + sign) / 2
    return _dot(_dot(p, kept), kept), one


def polar_by_svd(k: jax.Array, tolerance: float) -> jax.Array:
    """Return the factor as one matrix, for the benchmark of both ways."""
    left, right = by_svd(k, tolerance)
    return _dot(left, right.T)


def polar_by_products(k: jax.Array, tolerance: float) -> jax.Array:
    """Return the factor as one matrix, for the benchmark of both ways."""
    left, right = by_products(k, tolerance)
    return _dot(left, right.T)


@jax.custom_jvp
def _singular(x: jax.Array, y: jax.Array, groups: Groups):
    """``U``, ``S`` and ``V`` of K, those of the null vectors 0."""

    def factored(x, y, groups):
        bases, k, scale = _scaled(x, y, groups)
        u, s, vt = jnp.linalg.svd(k / scale[:, None], full_matrices=False)
        keep = s > tolerance(k)
        # A singular vector has entries in one group alone, so that one's scale is its own.
        s = jnp.where(keep, s * _dot((u**2).T, jnp.broadcast_to(scale, u.shape[:1])), 0)
        u, v = (
            (z if q is None else _dot(q, z)) * keep.astype(z.dtype)[None, :]
            for q, z in zip(bases, (u, vt.T), strict=True)
        )
        return u, s, v

    double = in_double(factored)
    return jax.lax.platform_dependent(
        x, y, groups, cpu=double, cuda=double, rocm=double, default=factored
    )


@_singular.defjvp
def _(primals, tangents):
    raise NotImplementedError("this loss has no third derivatives here, only two")
