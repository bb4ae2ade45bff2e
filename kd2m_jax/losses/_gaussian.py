"""Distances between Gaussians fitted to features: W2 and KL, marginal and by class."""

import jax
from jax.typing import ArrayLike

from kd2m_jax.losses import _gaussian_samples as samples
from kd2m_jax.losses import _gaussian_statistics as statistics
from kd2m_jax.losses._checks import (
    apart_labels,
    choice,
    clouds,
    filled,
    flag,
    kept_rows,
    labelled_rows,
    loss,
)
from kd2m_jax.losses._groups import Groups, by_class, by_classes_apart, everyone
from kd2m_jax.losses._polar import polar_by_products as polar_by_products
from kd2m_jax.losses._polar import polar_by_svd as polar_by_svd
from kd2m_jax.losses._polar import tolerance as tolerance
from kd2m_jax.losses._statistics import COVARIANCES, ClassStatistics


@loss
def gaussian_w2(
    z_s: ArrayLike,
    z_t: ArrayLike | ClassStatistics,
    *,
    covariance: str = "full",
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Squared 2-Wasserstein distance between Gaussians fitted to the two clouds.

    ``W2^2 = ||mu_S - mu_T||^2 + Tr(S_S + S_T - 2 (S_S^1/2 S_T S_S^1/2)^1/2)`` with means mu and
    covariances S (divided by n). With centred rows X, Y scaled by 1/sqrt(n), the last term is
    the nuclear norm of ``X Y^T``, so no covariance is inverted and any rank will do.

    Value and gradient are right to 1% for features down to 1e-6 of the largest one's scale, each
    to its own; a feature at 1e-8 counts as unmatched. Where the pairing is taken in float32 (TPUs)
    the borders are 1e-2 and 1e-3. First and second derivatives are available, third ones raise.

    Between other examples (a bank, statistics) it does not know of classes, as `w2` does not: not
    for a student with a fresh head, nor where the classes' shares differ. `gaussian_cw2` does.

    Cost: for d < n time O(n d^2), memory O(n d); else O(n^2 d) and O(n d). Diagonal: O(n d).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n. Or its
        `ClassStatistics`, of which the mixture's mean and covariance count.
      covariance: "full", or "diagonal" (``sum_c (sigma_S,c - sigma_T,c)^2``: correlations are
        ignored).
      where: ``[n]`` bool, the rows that count, for m = n; None for all. A row that does not is
        as if it were not there, on both sides, whatever it holds.

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
    if isinstance(z_t, ClassStatistics):
        choice("covariance", covariance, COVARIANCES)
        return statistics.w2(*statistics.one_class(z_s, z_t, where), covariance)
    return samples.w2(*_together(z_s, z_t, where), covariance)


@loss
def gaussian_cw2(
    z_s: ArrayLike,
    z_t: ArrayLike | ClassStatistics,
    labels: ArrayLike,
    *,
    covariance: str = "full",
    rotation: bool = False,
    labels_t: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""`gaussian_w2` within each class, averaged over the K classes present in the batch.

    ``CW2^2 = 1/K sum_y W2^2(N(mu_S,y, S_S,y), N(mu_T,y, S_T,y))``, computed at once: the sum of
    the trace terms is the nuclear norm of one block-masked n x n matrix.

    With ``rotation=True`` the teacher's space is turned onto the student's first, as `cw2` says,
    with the Gaussians' own couplings. K classes give K^2 - 1 directions at most: with fewer than
    features the others stay as near as may be to unturned, and with one class nothing is turned.
    Where a class has fewer samples than features the optimum is local indeed: the value may be
    above the one without a rotation.

    Cost: time O(n^2 (n + d)), memory O(n^2), whatever the number of classes; with rotation time
    O(d^3) and memory O(d^2) more.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples; or its
        `ClassStatistics`, of which the classes that the batch has count.
      labels: ``[n]`` integers >= 0, their classes. A row of -1 is left out; other numbers make
        the loss NaN.
      covariance: "full" or "diagonal".
      rotation: whether the distance is that after a rotation of the teacher's space, as in `cw2`.
        It takes full covariances.
      labels_t: as in `cw2`, where the teacher's rows are of other examples.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

    Returns:
      Scalar, a *squared* distance, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, an unknown covariance, rotation with diagonal ones.
      TypeError: labels that are not integers, features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.0], [2.0], [5.0]])
      >>> print(f"{gaussian_cw2(z, z + 1, jnp.array([0, 0, 1])):.4f}")
      1.0000

    References:
      Fernandes Montesuma, KD2M, GSI 2025, CW2 (G).
    """
    choice("covariance", covariance, COVARIANCES)
    if flag("rotation", rotation) and covariance != "full":
        raise ValueError(
            "rotation=True mixes features, which covariance='diagonal' keeps apart: use "
            "covariance='full'"
        )
    if isinstance(z_t, ClassStatistics):
        both = statistics.classes(z_s, z_t, labels, labels_t, where)
        return statistics.w2(*(statistics.aligned(*both) if rotation else both), covariance)
    given = _by_class(z_s, z_t, labels, labels_t, where)
    return samples.w2(*(samples.aligned(*given) if rotation else given), covariance)


@loss
def gaussian_kl(
    z_s: ArrayLike,
    z_t: ArrayLike | ClassStatistics,
    *,
    covariance: str = "full",
    shrinkage: float = 0.1,
    direction: str = "student_teacher",
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Kullback-Leibler divergence between Gaussians fitted to the two clouds.

    ``KL(P || Q) = 1/2 (Tr(S_Q^-1 S_P) + (mu_Q - mu_P)^T S_Q^-1 (mu_Q - mu_P) - d
    + log det S_Q - log det S_P)``, where ``S = Cov + s I``, Cov divides by n, and
    ``s = shrinkage (tr Cov(z_s) + tr Cov(z_t)) / (2 d)`` is a constant for the gradient. Without
    it KL is infinite for n <= d or a dead feature.

    It is computed on d x d matrices where d < n and d < m, where clouds that nearly agree keep
    their digits, and else on n x n ones, as `gaussian_ckl` is. There rounding is about 1e-4 nats:
    a value below 1e-3 is not right to 1%, while the gradient still is.

    Cost: for d < n time O(n d^2), memory O(n d); else O(n^2 d) and O(n d). Diagonal: O(n d).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n. Or its
        `ClassStatistics`, of which the mixture's mean and covariance count.
      covariance: "full" or "diagonal".
      shrinkage: > 0, s relative to the mean variance of a feature; 0.1 by default. The smaller
        it is, the more the directions that the batch does not span weigh; below 1e-4 float32
        runs out of digits.
      direction: "student_teacher" for ``KL(P_S || P_T)``, "teacher_student" for the reverse.
      where: ``[n]`` bool, the rows that count, for m = n; None for all. A row that does not is
        as if it were not there, on both sides, whatever it holds.

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
    if isinstance(z_t, ClassStatistics):
        given = statistics.one_class(z_s, z_t, where)
        return statistics.kl(*given, covariance, shrinkage, direction)
    return samples.kl(*_together(z_s, z_t, where), covariance, shrinkage, direction)


@loss
def gaussian_ckl(
    z_s: ArrayLike,
    z_t: ArrayLike | ClassStatistics,
    labels: ArrayLike,
    *,
    covariance: str = "full",
    shrinkage: float = 0.1,
    direction: str = "student_teacher",
    labels_t: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""`gaussian_kl` within each class, averaged over the K classes present in the batch.

    ``1/K sum_y KL(N(mu_S,y, S_S,y) || N(mu_T,y, S_T,y))``; the amount s that is added to every
    covariance is that of `gaussian_kl`, taken over the whole batch.

    Cost: time O(n^2 (n + d)), memory O(n^2), whatever the number of classes.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples; or its
        `ClassStatistics`, of which the classes that the batch has count.
      labels: ``[n]`` integers >= 0, their classes. A row of -1 is left out; other numbers make
        the loss NaN.
      covariance: "full" or "diagonal".
      shrinkage: > 0, as in `gaussian_kl`.
      direction: "student_teacher" or "teacher_student".
      labels_t: as in `cw2`, where the teacher's rows are of other examples.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

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
    if isinstance(z_t, ClassStatistics):
        given = statistics.classes(z_s, z_t, labels, labels_t, where)
        return statistics.kl(*given, covariance, shrinkage, direction)
    return samples.kl(
        *_by_class(z_s, z_t, labels, labels_t, where), covariance, shrinkage, direction
    )


def _together(z_s, z_t, where) -> tuple[jax.Array, jax.Array, Groups]:
    z_s, z_t = clouds(z_s, z_t)
    keep = kept_rows(where, len(z_s), len(z_t))
    z_s, z_t = filled(keep, z_s, z_t)
    return z_s, z_t, everyone(len(z_s), len(z_t), z_s.dtype, keep)


def _by_class(z_s, z_t, labels, labels_t, where) -> tuple[jax.Array, jax.Array, Groups]:
    if labels_t is not None:
        z_s, z_t = clouds(z_s, z_t)
        labels, labels_t = apart_labels(labels, labels_t, where, len(z_s), len(z_t))
        groups = by_classes_apart(labels, labels_t, z_s.dtype)
        (z_s,), (z_t,) = filled(groups.keep, z_s), filled(groups.keep_t, z_t)
        return z_s, z_t, groups
    z_s, z_t = clouds(z_s, z_t, paired=True)
    labels, keep = labelled_rows(labels, where, len(z_s))
    z_s, z_t = filled(keep, z_s, z_t)
    return z_s, z_t, by_class(labels, keep, z_s.dtype)
