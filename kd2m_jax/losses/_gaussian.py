"""Distances between Gaussians fitted to features: W2 and KL, marginal and by class.

Full covariances are never formed. Everything is computed on n x n matrices of inner products,
masked to the pairs of one group, so a batch smaller than the feature size (a singular
covariance) is the normal case and the number of classes does not show in the cost.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import choice, clouds, loss, number
from kd2m_jax.losses._groups import HIGHEST, Groups, by_class, centred, everyone, safe_sqrt

COVARIANCES = ("full", "diagonal")
DIRECTIONS = ("student_teacher", "teacher_student")


@loss
def gaussian_w2(z_s: ArrayLike, z_t: ArrayLike, *, covariance: str = "full") -> jax.Array:
    r"""Squared 2-Wasserstein distance between Gaussians fitted to the two clouds.

    ``W2^2 = ||mu_S - mu_T||^2 + Tr(S_S + S_T - 2 (S_S^1/2 S_T S_S^1/2)^1/2)`` with means mu and
    covariances S (divided by n). With centred rows X, Y scaled by 1/sqrt(n), the last term is
    the nuclear norm of ``X Y^T``, so no covariance is inverted and any rank will do.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n.
      covariance: "full", or "diagonal" (``sum_c (sigma_S,c - sigma_T,c)^2``: correlations are
        ignored).

    Returns:
      Scalar, a *squared* distance, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, an unknown covariance.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[-1.0, 0.0], [1.0, 0.0]])
      >>> print(f"{gaussian_w2(3 * z + 1, z):.4f}")  # |(1, 1)|^2 + (3 - 1)^2
      6.0000

    References:
      Fernandes Montesuma, KD2M, GSI 2025, W2 (G); Dowson & Landau, J. Multivar. Anal. 1982.
    """
    z_s, z_t = clouds(z_s, z_t)
    return _w2(z_s, z_t, everyone(z_s.shape[0], z_t.shape[0], z_s.dtype), covariance)


@loss
def gaussian_cw2(
    z_s: ArrayLike, z_t: ArrayLike, labels: ArrayLike, *, covariance: str = "full"
) -> jax.Array:
    r"""`gaussian_w2` within each class, averaged over the K classes present in the batch.

    ``CW2^2 = 1/K sum_y W2^2(N(mu_S,y, S_S,y), N(mu_T,y, S_T,y))``, computed at once: the sum of
    the trace terms is the nuclear norm of one block-masked n x n matrix.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples.
      labels: ``[n]`` integers >= 0, their classes; others make the loss NaN.
      covariance: "full" or "diagonal".

    Returns:
      Scalar, a *squared* distance, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, an unknown covariance.
      TypeError: labels that are not integers, features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.0], [2.0], [5.0]])
      >>> print(f"{gaussian_cw2(z, z + 1, jnp.array([0, 0, 1])):.4f}")
      1.0000

    References:
      Fernandes Montesuma, KD2M, GSI 2025, CW2 (G).
    """
    z_s, z_t = clouds(z_s, z_t, paired=True)
    return _w2(z_s, z_t, by_class(labels, z_s.shape[0], z_s.dtype), covariance)


@loss
def gaussian_kl(
    z_s: ArrayLike,
    z_t: ArrayLike,
    *,
    covariance: str = "full",
    shrinkage: float = 0.1,
    direction: str = "student_teacher",
) -> jax.Array:
    r"""Kullback-Leibler divergence between Gaussians fitted to the two clouds.

    ``KL(P || Q) = 1/2 (Tr(S_Q^-1 S_P) + (mu_Q - mu_P)^T S_Q^-1 (mu_Q - mu_P) - d
    + log det S_Q - log det S_P)``, where ``S = Cov + s I``, Cov divides by n, and
    ``s = shrinkage (tr Cov(z_s) + tr Cov(z_t)) / (2 d)`` is a constant for the gradient. Without
    it KL is infinite for n <= d or a dead feature.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n.
      covariance: "full" or "diagonal".
      shrinkage: > 0, s relative to the mean variance of a feature; 0.1 by default. The smaller
        it is, the more the directions that the batch does not span weigh; below 1e-4 float32
        runs out of digits.
      direction: "student_teacher" for ``KL(P_S || P_T)``, "teacher_student" for the reverse.

    Returns:
      Scalar in nats, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, an unknown covariance or direction, shrinkage <= 0.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[-1.0], [1.0]])
      >>> print(f"{gaussian_kl(z + 1, z, shrinkage=0.25):.4f}")  # 1/2 mu^2 / (sigma^2 + s)
      0.4000

    References:
      Fernandes Montesuma, KD2M, GSI 2025, KL (G).
    """
    z_s, z_t = clouds(z_s, z_t)
    groups = everyone(z_s.shape[0], z_t.shape[0], z_s.dtype)
    return _kl(z_s, z_t, groups, covariance, shrinkage, direction)


@loss
def gaussian_ckl(
    z_s: ArrayLike,
    z_t: ArrayLike,
    labels: ArrayLike,
    *,
    covariance: str = "full",
    shrinkage: float = 0.1,
    direction: str = "student_teacher",
) -> jax.Array:
    r"""`gaussian_kl` within each class, averaged over the K classes present in the batch.

    ``1/K sum_y KL(N(mu_S,y, S_S,y) || N(mu_T,y, S_T,y))``; the amount s that is added to every
    covariance is that of `gaussian_kl`, taken over the whole batch.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples.
      labels: ``[n]`` integers >= 0, their classes; others make the loss NaN.
      covariance: "full" or "diagonal".
      shrinkage: > 0, as in `gaussian_kl`.
      direction: "student_teacher" or "teacher_student".

    Returns:
      Scalar in nats, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, an unknown covariance or direction, shrinkage <= 0.
      TypeError: labels that are not integers, features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.0], [2.0], [5.0], [9.0]])
      >>> print(f"{gaussian_ckl(z + 1, z, jnp.array([0, 0, 1, 1]), shrinkage=0.1):.4f}")
      0.1648

    References:
      Fernandes Montesuma, KD2M, GSI 2025: its KL (G), conditional as its CW2 is.
    """
    z_s, z_t = clouds(z_s, z_t, paired=True)
    groups = by_class(labels, z_s.shape[0], z_s.dtype)
    return _kl(z_s, z_t, groups, covariance, shrinkage, direction)


def _w2(z_s: jax.Array, z_t: jax.Array, groups: Groups, covariance: str) -> jax.Array:
    choice("covariance", covariance, COVARIANCES)
    z_s, z_t = centred(z_s, z_t)
    mean_s, mean_t = groups.mean(z_s), groups.mean(z_t)
    means = groups.average(jnp.sum((mean_s - mean_t) ** 2, axis=1))
    if covariance == "diagonal":
        var_s, var_t = groups.mean((z_s - mean_s) ** 2), groups.mean((z_t - mean_t) ** 2)
        gap = (safe_sqrt(var_s) - safe_sqrt(var_t)) ** 2
        return means + groups.average(jnp.sum(gap, axis=1))
    x = (z_s - mean_s) * jnp.sqrt(groups.weight_s)[:, None]
    y = (z_t - mean_t) * jnp.sqrt(groups.weight_t)[:, None]
    return means + jnp.sum(x**2) + jnp.sum(y**2) - 2 * _nuclear_norm(x, y, groups)


def _nuclear_norm(x: jax.Array, y: jax.Array, groups: Groups) -> jax.Array:
    """``||(X Y^T) o M||_*``, the sum over groups of ``Tr((S_P^1/2 S_Q S_P^1/2)^1/2)``.

    The norm is ``max <P, K>`` over contractions P, attained at the polar factor of K, so with
    P held constant the gradient is exact and nothing is differentiated through the SVD: P plays
    the part that the coupling plays in `w2`.
    """
    if groups.same is None:
        # One group has at most d directions: with X = Q R, the norm of X Y^T is that of R Y^T.
        # A mask does not commute with Q, so classes stay at n x n.
        x, y = (_coordinates(z) if z.shape[0] > z.shape[1] else z for z in (x, y))
    k = groups.within(jnp.matmul(x, y.T, precision=HIGHEST))
    # Classes may differ in scale by orders of magnitude: bring each block's norm to at most 1,
    # so that one tolerance tells rounding from signal in all of them.
    norms = [jax.lax.stop_gradient(groups.total(jnp.sum(z**2, axis=1))) for z in (x, y)]
    scale = jnp.sqrt(norms[0]) * jnp.sqrt(norms[1])
    unit = jax.lax.stop_gradient(k) / jnp.where(scale > 0, scale, 1)[:, None]
    # Then close to 1: where it is n times smaller, what the tolerance cuts off is a part of the
    # value (0.5% at n = 1,024, d = 2,048). Below 1 / sqrt(n) K may be nothing but rounding.
    size = jnp.sqrt(groups.total(jnp.sum(unit**2, axis=1)))
    polar = _polar_factor(unit / jnp.maximum(size, len(k) ** -0.5)[:, None])
    return jnp.sum(jax.lax.stop_gradient(polar) * k)


def _polar_factor(k: jax.Array) -> jax.Array:
    """``U V^T`` of the singular vectors of K, norm at most 1, zero where a value is rounding.

    Centring leaves null vectors, whose directions are noise that depends on the batch's order.

    By backend: on the CPU the SVD (two cores, n = 128 and 512: 2.4 and 48 ms, products 14 and
    327). On accelerators, where an SVD is a long chain of small kernels, matrix products,
    which pass the same oracle tests (not timed there yet).
    """
    return jax.lax.platform_dependent(
        k,
        cpu=lambda k: polar_by_svd(k, tolerance(k)),
        default=lambda k: polar_by_products(k, tolerance(k)),
    )


def tolerance(k: jax.Array) -> float:
    """Singular values below are rounding, of a matrix of norm at most 1."""
    return 4 * float(jnp.finfo(k.dtype).eps) * max(k.shape) ** 0.5


def polar_by_svd(k: jax.Array, tolerance: float) -> jax.Array:
    """By the singular vectors."""
    u, s, vt = jnp.linalg.svd(k, full_matrices=False)
    return jnp.matmul(u * (s > tolerance)[None, :], vt, precision=HIGHEST)


def polar_by_products(k: jax.Array, tolerance: float) -> jax.Array:
    """Newton-Schulz twice: K = P H, then P without the directions where H is below tolerance.

    Each step takes a singular value s to ``s (3 - s^2) / 2``, a small one to 1.5 times itself.
    """
    steps = math.ceil(math.log(1 / tolerance, 1.5)) + 6

    def to_ones(p):
        def step(_, p):
            gram = jnp.matmul(p.T, p, precision=HIGHEST)
            return 1.5 * p - 0.5 * jnp.matmul(p, gram, precision=HIGHEST)

        return jax.lax.fori_loop(0, steps, step, p)

    p = to_ones(k)
    h = jnp.matmul(p.T, k, precision=HIGHEST)
    one = jnp.eye(len(h), dtype=h.dtype)
    sign = to_ones((h + h.T) / 2 - tolerance * one)
    return jnp.matmul(p, (one + sign) / 2, precision=HIGHEST)


def _coordinates(z: jax.Array) -> jax.Array:
    """``Q^T Z`` in an orthonormal basis Q of Z's columns, which is a constant for the gradient."""
    q, _ = jnp.linalg.qr(jax.lax.stop_gradient(z))
    return jnp.matmul(q.T, z, precision=HIGHEST)


def _kl(
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
    ridge = jax.lax.stop_gradient(_ridge(z_s, z_t, shrinkage))
    z_s, z_t = centred(z_s, z_t)
    if direction == "teacher_student":
        groups = groups._replace(size_s=groups.size_t, size_t=groups.size_s)
        z_s, z_t = z_t, z_s
    mean_p, mean_q = groups.mean(z_s), groups.mean(z_t)
    p, q = z_s - mean_p, z_t - mean_q
    # The second moment of P about Q's mean holds both the trace and the shift of the means.
    about_q = z_s - mean_q
    if covariance == "diagonal":
        var_p, var_q = groups.mean(p**2) + ridge, groups.mean(q**2) + ridge
        moment = groups.mean(about_q**2) + ridge
        terms = moment / var_q - 1 + jnp.log(var_q) - jnp.log(var_p)
        return groups.average(jnp.sum(terms, axis=1)) / 2
    size_p, size_q = (ridge * size[:, None] for size in (groups.size_s, groups.size_t))
    p, about_q, q = p / jnp.sqrt(size_p), about_q / jnp.sqrt(size_p), q / jnp.sqrt(size_q)
    return _kl_full(p, about_q, q, groups)


def _ridge(z_s: jax.Array, z_t: jax.Array, shrinkage: float) -> jax.Array:
    """The s that is added to every covariance's diagonal, over the whole batch."""
    s = shrinkage * (jnp.mean(jnp.var(z_s, axis=0)) + jnp.mean(jnp.var(z_t, axis=0))) / 2
    # All points equal: s is 0 or the square of a rounding error. Stay above the latter.
    second_moment = (jnp.mean(z_s**2) + jnp.mean(z_t**2)) / 2
    eps = jnp.finfo(s.dtype)
    return jnp.maximum(s, eps.eps**2 * second_moment + jnp.sqrt(eps.tiny))


def _kl_full(x: jax.Array, x_about_q: jax.Array, y: jax.Array, groups: Groups) -> jax.Array:
    """KL between the Gaussians of rows x and y, already divided by sqrt(n s), mean over groups.

    The covariances are ``s (X^T X + I)`` and ``s (Y^T Y + I)``. Their determinants are those of
    ``I + X X^T`` and ``I + Y Y^T`` (matrix determinant lemma), and Q's inverse comes from
    ``(I + Y Y^T)^-1`` (Woodbury): matrices over samples, where blocks of different groups do
    not mix, so one masked Cholesky factor holds them all.
    """
    gram_x, gram_y = (
        jnp.eye(z.shape[0], dtype=z.dtype) + groups.within(jnp.matmul(z, z.T, precision=HIGHEST))
        for z in (x, y)
    )
    chol_x, chol_y = jnp.linalg.cholesky(gram_x), jnp.linalg.cholesky(gram_y)
    log_dets = 2 * (jnp.sum(jnp.log(jnp.diag(chol_y))) - jnp.sum(jnp.log(jnp.diag(chol_x))))
    inverse = jax.scipy.linalg.cho_solve((chol_y, True), jnp.eye(*gram_y.shape, dtype=y.dtype))
    # Tr(X (Y^T Y + I)^-1 X^T) is the ridge regression min_A |X - A Y|^2 + |A|^2. In this form
    # nothing cancels, an error in A counts only squared, and A is a constant for the gradient.
    cross = groups.within(jnp.matmul(x_about_q, y.T, precision=HIGHEST))
    a = jax.lax.stop_gradient(jnp.matmul(cross, inverse, precision=HIGHEST))
    fit = jnp.sum((x_about_q - jnp.matmul(a, y, precision=HIGHEST)) ** 2) + jnp.sum(a**2)
    # Tr((Y^T Y + I)^-1) - d, once more over samples.
    rest = jnp.trace(inverse) - inverse.shape[0]
    return (fit + rest + log_dets) / (2 * groups.count)
