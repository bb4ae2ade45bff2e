"""Gaussian distances between samples: W2 and KL, marginal and by class.

By class everything is computed on n x n matrices of inner products, masked to the pairs of one
group, so a batch smaller than the feature size (a singular covariance) is the normal case and
the number of classes does not show in the cost. One group of more samples than features takes
d x d matrices.
"""

import functools

import jax
import jax.numpy as jnp

from kd2m_jax.losses._checks import choice, number
from kd2m_jax.losses._groups import Groups
from kd2m_jax.losses._numerics import HIGHEST, centred, in_unit, magnitude, safe_sqrt
from kd2m_jax.losses._polar import factors_within, unmatched
from kd2m_jax.losses._rotation import NO_DIRECTION, turned
from kd2m_jax.losses._statistics import COVARIANCES

_dot = functools.partial(jnp.matmul, precision=HIGHEST)
DIRECTIONS = ("student_teacher", "teacher_student")


def w2(z_s: jax.Array, z_t: jax.Array, groups: Groups, covariance: str) -> jax.Array:
    choice("covariance", covariance, COVARIANCES)
    z_s, z_t = centred(z_s, z_t)
    mean_s, mean_t = groups.mean_s(z_s), groups.mean_t(z_t)
    means = groups.average(jnp.sum((mean_s - groups.mean_t_at_s(z_t)) ** 2, axis=1))
    if covariance == "diagonal":
        x, y = z_s - mean_s, z_t - mean_t
        unit = magnitude(x, y, axis=0)
        std_s = in_unit(_deviation_s, unit, x, groups)
        std_t = in_unit(_deviation_t, unit, y, groups)
        return means + groups.average(jnp.sum((std_s - std_t) ** 2, axis=1))
    x = (z_s - mean_s) * jnp.sqrt(groups.weight_s)[:, None]
    y = (z_t - mean_t) * jnp.sqrt(groups.weight_t)[:, None]
    return means + unmatched(x, y, groups)


def aligned(z_s: jax.Array, z_t: jax.Array, groups: Groups) -> tuple[jax.Array, jax.Array, Groups]:
    """Return the samples with the teacher's turned onto the student's, class by class."""
    root_s, root_t = (jnp.sqrt(w)[:, None] for w in (groups.weight_s, groups.weight_t))

    def coupled(x: jax.Array, y: jax.Array, start: jax.Array) -> jax.Array:
        x, y = x * root_s, y * root_t
        to_s, to_t = factors_within(start, NO_DIRECTION, x, y, groups)
        return root_t * _dot(to_t, _dot(to_s.T, x))

    return *turned(z_s, z_t, groups, coupled), groups


def _deviation_s(z: jax.Array, groups: Groups) -> jax.Array:
    """Each feature's standard deviation in each student's group, of the students."""
    return safe_sqrt(groups.mean_s(z**2))


def _deviation_t(z: jax.Array, groups: Groups) -> jax.Array:
    """Return the same of the teachers."""
    return safe_sqrt(groups.mean_t_at_s(z**2))


def kl(
    z_s: jax.Array,
    z_t: jax.Array,
    groups: Groups,
    covariance: str,
    shrinkage: float,
    direction: str,
) -> jax.Array:
    choice("covariance", covariance, COVARIANCES)
    choice("direction", direction, DIRECTIONS)
    number("shrinkage", shrinkage)
    z_s, z_t, ridge = _unit_scale(z_s, z_t, shrinkage, groups)
    if direction == "teacher_student":
        groups = groups.swapped()
        z_s, z_t = z_t, z_s
    mean_p, mean_q = groups.mean_s(z_s), groups.mean_t_at_s(z_t)
    # The second moment of P about Q's mean holds both the trace and the shift of the means.
    p, about_q = groups.kept_s(z_s - mean_p), groups.kept_s(z_s - mean_q)
    q = groups.kept_t(z_t - groups.mean_t(z_t))
    if covariance == "diagonal":
        var_p, var_q = groups.mean_s(p**2) + ridge, groups.mean_t_at_s(q**2) + ridge
        moment = groups.mean_s(about_q**2) + ridge
        terms = moment / var_q - 1 + jnp.log(var_q) - jnp.log(var_p)
        return groups.average(jnp.sum(terms, axis=1)) / 2
    size_p, size_q = (ridge * size[:, None] for size in (groups.size_s, groups.size_t))
    p, about_q, q = p / jnp.sqrt(size_p), about_q / jnp.sqrt(size_p), q / jnp.sqrt(size_q)
    if groups.same is None and p.shape[1] < min(len(p), len(q)):
        return kl_over_features(p, q, (mean_p - mean_q) / jnp.sqrt(ridge))
    return _kl_over_samples(p, about_q, q, groups)


def _unit_scale(
    z_s: jax.Array, z_t: jax.Array, shrinkage: float, groups: Groups
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both clouds centred, in a unit near their size, and the s added to every covariance there.

    KL does not depend on the unit, and in this one the squares of features stay numbers. s is
    taken over the whole batch, and is a constant for the gradient.
    """
    eps = jnp.finfo(z_s.dtype)
    x, y = centred(z_s, z_t)
    # Where all points are equal, what is left is rounding, or 0.
    unit = magnitude(x, y, eps.eps * z_s, eps.eps * z_t)
    x, y = x / unit, y / unit
    s = shrinkage * (_variance(x, groups.keep) + _variance(y, groups.keep_t)) / 2
    # There s is 0 or the square of a rounding error. Stay above the latter.
    second_moment = (jnp.mean((z_s / unit) ** 2) + jnp.mean((z_t / unit) ** 2)) / 2
    s = jnp.maximum(s, eps.eps**2 * second_moment + jnp.sqrt(eps.tiny))
    return x, y, jax.lax.stop_gradient(s)


def _variance(z: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Return the mean variance of a feature, over the rows that count; the others are filled."""
    variance = jnp.mean(jnp.var(z, axis=0))
    if keep is None:
        return variance
    return variance * len(keep) / jnp.maximum(jnp.sum(keep), 1)  # rows at the mean add nothing


def kl_over_features(x: jax.Array, y: jax.Array, shift: jax.Array) -> jax.Array:
    """KL between the Gaussians of rows x and y and means ``shift`` apart, all by sqrt(n s).

    The covariances are ``s L L^T`` with ``L_P L_P^T = X^T X + I``, d x d. With
    ``W = L_Q^-1 L_P``, also lower triangular, and ``v = L_Q^-1 shift``,
    ``2 KL = |W|^2 - d - 2 log det W + |v|^2``: entry by entry nothing cancels, so that clouds
    that nearly agree keep their digits.
    """
    one = jnp.eye(x.shape[1], dtype=x.dtype)
    chol_p, chol_q = (
        jnp.linalg.cholesky(one + jnp.matmul(z.T, z, precision=HIGHEST)) for z in (x, y)
    )
    both = jnp.concatenate([chol_p, shift.T], axis=1)
    solved = jax.scipy.linalg.solve_triangular(chol_q, both, lower=True)
    w, v = solved[:, :-1], solved[:, -1]
    off = jnp.sum(jnp.tril(w, -1) ** 2)
    # t^2 - 1 - 2 log t of t = 1 + e, each >= 0.
    e = (jnp.diag(chol_p) - jnp.diag(chol_q)) / jnp.diag(chol_q)
    return (off + jnp.sum(_square_less_log(e)) + jnp.sum(v**2)) / 2


def _square_less_log(e: jax.Array) -> jax.Array:
    """``(1 + e)^2 - 1 - 2 log(1 + e)``, by its series where the terms cancel."""
    near = jnp.abs(e) < 0.03
    small, large = jnp.where(near, e, 0), jnp.where(near, 1, e)
    series = 2 + small * (-2 / 3 + small * (1 / 2 + small * (-2 / 5 + small / 3)))
    return jnp.where(near, small**2 * series, large * (2 + large) - 2 * jnp.log1p(large))


def _kl_over_samples(x: jax.Array, x_about_q: jax.Array, y: jax.Array, groups: Groups) -> jax.Array:
    """KL between the Gaussians of rows x and y, already divided by sqrt(n s), mean over groups.

    The covariances are ``s (X^T X + I)`` and ``s (Y^T Y + I)``. Their determinants are those of
    ``I + X X^T`` and ``I + Y Y^T`` (matrix determinant lemma), and Q's inverse comes from
    ``(I + Y Y^T)^-1`` (Woodbury): matrices over samples, where blocks of different groups do
    not mix, so one masked Cholesky factor holds them all.
    """
    gram_x, gram_y = (
        jnp.eye(z.shape[0], dtype=z.dtype) + side.within(jnp.matmul(z, z.T, precision=HIGHEST))
        for z, side in ((x, groups.of_students()), (y, groups.of_teachers()))
    )
    chol_x, chol_y = jnp.linalg.cholesky(gram_x), jnp.linalg.cholesky(gram_y)
    log_dets = 2 * (jnp.sum(jnp.log(jnp.diag(chol_y))) - jnp.sum(jnp.log(jnp.diag(chol_x))))
    inverse = jax.scipy.linalg.cho_solve((chol_y, True), jnp.eye(*gram_y.shape, dtype=y.dtype))
    # Tr((Y^T Y + I)^-1) - d, once more over samples.
    rest = jnp.trace(inverse) - inverse.shape[0]
    return (_ridge_fit(x_about_q, y, inverse, groups) + rest + log_dets) / (2 * groups.count)


@jax.custom_jvp
def _ridge_fit(x: jax.Array, y: jax.Array, inverse: jax.Array, groups: Groups) -> jax.Array:
    """``Tr(X (Y^T Y + I)^-1 X^T)``, as the ridge regression ``min_A |X - A Y|^2 + |A|^2``.

    In this form nothing cancels, and an error in A counts only squared.
    """
    a = _coefficients(x, y, inverse, groups)
    return jnp.sum((x - jnp.matmul(a, y, precision=HIGHEST)) ** 2) + jnp.sum(a**2)


@_ridge_fit.defjvp
def _(primals, tangents):
    # A is optimal, so to first order it is a constant; to second order it is not.
    x, y = primals[:2]
    a = _coefficients(*primals)
    left_over = x - jnp.matmul(a, y, precision=HIGHEST)
    slope_y = -jnp.matmul(a.T, left_over, precision=HIGHEST)
    slope = jnp.sum(left_over * tangents[0]) + jnp.sum(slope_y * tangents[1])
    return _ridge_fit(*primals), 2 * slope


def _coefficients(x: jax.Array, y: jax.Array, inverse: jax.Array, groups: Groups) -> jax.Array:
    cross = groups.within(jnp.matmul(x, y.T, precision=HIGHEST))
    return jnp.matmul(cross, inverse, precision=HIGHEST)
