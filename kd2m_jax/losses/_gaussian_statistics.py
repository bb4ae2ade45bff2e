"""Gaussian distances to statistics of classes instead of to samples.

Marginally there is one class: the mixture. Everything is kept per class, ``[K, ...]``, and a class
that is on one side alone is left out.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd2m_jax.losses._checks import choice, emptied, kept_rows, labelled_rows, matrix, number
from kd2m_jax.losses._gaussian_samples import DIRECTIONS, kl_over_features
from kd2m_jax.losses._groups import Apart, Groups, everyone
from kd2m_jax.losses._numerics import HIGHEST, magnitude, safe_sqrt
from kd2m_jax.losses._polar import factors_within, unmatched
from kd2m_jax.losses._rotation import NO_DIRECTION, rotation
from kd2m_jax.losses._statistics import COVARIANCES, ClassStatistics

_dot = functools.partial(jnp.matmul, precision=HIGHEST)


class Classes(NamedTuple):
    """A student's samples by class.

    Attributes:
      z: ``[n, d]``, 0 in rows that do not count.
      labels: ``[n]``, the class of each row, in the range of the statistics.
      member: ``[n, K]``, 1 where a row is of a class that both sides have.
      size: ``[K]``, at least 1.
      share: ``[K]``, 1 / count for the classes that both have, else 0.
      mean: ``[K, d]``.
    """

    z: jax.Array
    labels: jax.Array
    member: jax.Array
    size: jax.Array
    share: jax.Array
    mean: jax.Array


def _by_class(z: jax.Array, labels: jax.Array, keep: jax.Array, there: jax.Array) -> Classes:
    """Sort samples into the classes of which the other side is ``there``, ``[K]`` bool."""
    k = len(there)
    member = (labels[:, None] == jnp.arange(k)[None, :]) & keep[:, None] & there[None, :]
    size = jnp.sum(member, axis=0, dtype=z.dtype)
    present = size > 0
    share = present / jnp.maximum(jnp.sum(present), 1).astype(z.dtype)
    (z,) = emptied(jnp.any(member, axis=1), z)
    member, size = member.astype(z.dtype), jnp.maximum(size, 1)
    mean = jnp.matmul(member.T, z, precision=HIGHEST) / size[:, None]
    wrong = jnp.any(keep & (labels < -1))  # no class: the value is to be NaN
    share = jnp.where(wrong, jnp.nan, share)
    return Classes(z, jnp.clip(labels, 0, k - 1), member, size, share, mean)


def one_class(z_s, z_t: ClassStatistics, where):
    """Return the samples and the mixture, as those of a single class."""
    z_s, z_t = _against(z_s, z_t)
    keep = kept_rows(where, len(z_s), len(z_s))
    keep = jnp.ones(len(z_s), bool) if keep is None else keep
    labels, there = jnp.zeros(len(z_s), jnp.int32), jnp.ones(1, bool)
    return _by_class(z_s, labels, keep, there), z_t.marginal()


def classes(z_s, z_t: ClassStatistics, labels, labels_t, where):
    """Return the samples by class, and the statistics."""
    if labels_t is not None:
        raise ValueError("labels_t are the classes of a teacher's rows, and statistics have none")
    z_s, z_t = _against(z_s, z_t)
    labels, keep = labelled_rows(labels, where, len(z_s))
    return _by_class(z_s, labels, keep, z_t.shares > 0), z_t


def _against(z_s, z_t: ClassStatistics) -> tuple[jax.Array, ClassStatistics]:
    """Return samples and statistics in one dtype; ValueError where they are of other sizes."""
    z_s, d = matrix("z_s", z_s), z_t.means.shape[1]
    if z_s.shape[1] != d:
        raise ValueError(
            f"z_s has {z_s.shape[1]} features and the statistics are of {d}: map the student into "
            "the teacher's space with kd2m_jax.projected"
        )
    dtype = jnp.promote_types(z_s.dtype, z_t.means.dtype)
    return z_s.astype(dtype), ClassStatistics(*(a.astype(dtype) for a in z_t))


def kl(
    own: Classes, theirs: ClassStatistics, covariance: str, shrinkage: float, direction: str
) -> jax.Array:
    """KL between Gaussians, mean over the classes that both have."""
    choice("covariance", covariance, COVARIANCES)
    choice("direction", direction, DIRECTIONS)
    number("shrinkage", shrinkage)
    own, theirs = _scaled(own, theirs)
    both = _mean_variance(own) + jnp.mean(theirs.marginal().variances())
    # Where all points are equal, what is left is 0: stay above its rounding.
    ridge = jnp.maximum(shrinkage * both / 2, jnp.sqrt(jnp.finfo(own.z.dtype).tiny))
    ridge = jax.lax.stop_gradient(ridge)
    return _kl(own, theirs, covariance, ridge, direction == "teacher_student")


def w2(own: Classes, theirs: ClassStatistics, covariance: str) -> jax.Array:
    """Squared W2 between Gaussians, mean over the classes that both have."""
    means = jnp.sum(own.share[:, None] * (own.mean - theirs.means) ** 2)
    x = _centred(own)
    if covariance == "diagonal":
        std = safe_sqrt(jnp.matmul(own.member.T, x**2, precision=HIGHEST) / own.size[:, None])
        gaps = std - jnp.sqrt(theirs.variances())
        return means + jnp.sum(own.share[:, None] * gaps**2)
    weight = jnp.sum(own.member * (own.share / own.size)[None, :], axis=1)
    x = x * jnp.sqrt(weight)[:, None]
    roots = theirs.roots() * jnp.sqrt(own.share)[:, None, None]
    k, d = theirs.means.shape
    return means + unmatched(x, roots.reshape(k * d, d), _groups(own, k, d))


def aligned(own: Classes, theirs: ClassStatistics) -> tuple[Classes, ClassStatistics]:
    """Return both seen from the mean of their class means, the statistics turned onto the samples.

    Centres and rotation are constants for the gradient, as in `kd2m_jax.losses._rotation`.
    """
    k, d = theirs.means.shape
    there, share = own.share != 0, own.share[:, None]
    means = jnp.where(there[:, None], theirs.means, 0)
    covariances = jnp.where(there[:, None, None], theirs.full(), 0)
    theirs = theirs._replace(covariances=covariances)
    fixed, means, roots = jax.lax.stop_gradient((own, means, theirs.roots()))
    centre_s, centre_t = (jnp.sum(share * m, axis=0, keepdims=True) for m in (fixed.mean, means))
    mean_s, mean_t = fixed.mean - centre_s, means - centre_t
    weight = jnp.sum(own.member * (own.share / own.size)[None, :], axis=1)
    x = _centred(fixed) * jnp.sqrt(weight)[:, None]
    y = (roots * jnp.sqrt(own.share)[:, None, None]).reshape(k * d, d)
    groups = _groups(own, k, d)

    def within(start: jax.Array) -> jax.Array:
        to_s, to_t = factors_within(start, NO_DIRECTION, x, y, groups)
        return _dot(_dot(y.T, to_t), _dot(to_s.T, x))

    size_s, size_t = (
        jnp.sqrt(jnp.sum(share * mean**2) + jnp.sum(rows**2))
        for mean, rows in ((mean_s, x), (mean_t, y))
    )
    turn = rotation(_dot(mean_t.T, share * mean_s), size_s * size_t, within)
    turned = ClassStatistics(
        _dot(theirs.means - centre_t, turn), _dot(_dot(turn.T, covariances), turn), theirs.shares
    )
    counts = jnp.any(own.member > 0, axis=1)
    (z,) = emptied(counts, own.z - centre_s)
    return own._replace(z=z, mean=own.mean - centre_s), turned


def _centred(own: Classes) -> jax.Array:
    counts = jnp.any(own.member > 0, axis=1)
    return emptied(counts, own.z - own.mean[own.labels])[0]


def _groups(own: Classes, k: int, d: int) -> Groups:
    """Say which rows of samples and which of the roots are of one class."""
    n, dtype = len(own.z), own.z.dtype
    if k == 1:
        return everyone(n, d, dtype)
    # Rows that do not count are zeros, so it does not matter in which class they are.
    of_root = jnp.repeat(jnp.arange(k), d)
    same = own.labels[:, None] == of_root[None, :]
    one = jnp.ones(n, dtype), jnp.ones(k * d, dtype)
    apart = Apart(
        own.labels[:, None] == own.labels[None, :],
        jnp.ones((1, 1), bool),  # nobody asks how the roots are among themselves
        jnp.ones(k * d, bool),
        *one,
    )
    return Groups(same, *one, jnp.ones((), dtype), jnp.ones(n, bool), apart)


def _kl(
    own: Classes, theirs: ClassStatistics, covariance: str, ridge: jax.Array, reverse: bool
) -> jax.Array:
    """KL between Gaussians with ``ridge`` on the diagonals, mean over the classes, d x d."""
    x = _centred(own)
    if covariance == "diagonal":
        var_s = jnp.matmul(own.member.T, x**2, precision=HIGHEST) / own.size[:, None] + ridge
        var_t, gap2 = theirs.variances() + ridge, (own.mean - theirs.means) ** 2
        var_p, var_q = (var_t, var_s) if reverse else (var_s, var_t)
        terms = (var_p + gap2) / var_q - 1 + jnp.log(var_q) - jnp.log(var_p)
        return jnp.sum(own.share[:, None] * terms) / 2

    def of_class(each):
        member, size, root, gap = each
        rows = x * (jnp.sqrt(member / (size * ridge)))[:, None]
        other, shift = root / jnp.sqrt(ridge), (gap / jnp.sqrt(ridge))[None]
        return kl_over_features(*((other, rows) if reverse else (rows, other)), shift)

    gaps = own.mean - theirs.means
    each = jax.lax.map(of_class, (own.member.T, own.size, theirs.roots(), gaps))
    return jnp.sum(jnp.where(own.share != 0, own.share * each, 0))


def _scaled(own: Classes, theirs: ClassStatistics) -> tuple[Classes, ClassStatistics]:
    """Return both about a common centre and in a unit near their size: KL sees neither."""
    there = own.share != 0
    total = jnp.maximum(jnp.sum(own.share), 1e-30)
    centre = jnp.sum(own.share[:, None] * (own.mean + theirs.means), axis=0, keepdims=True)
    centre = centre / (2 * total)
    centre = jax.lax.stop_gradient(jnp.where(jnp.isfinite(centre), centre, 0))
    spread = jnp.where(there[:, None], jnp.sqrt(jnp.maximum(theirs.variances(), 0)), 0)
    means = jnp.where(there[:, None], theirs.means - centre, 0)
    counts = jnp.any(own.member > 0, axis=1)
    (z,) = emptied(counts, own.z - centre)
    unit = magnitude(z, spread, means)
    covariances = theirs.covariances / unit / unit
    theirs = theirs._replace(means=(theirs.means - centre) / unit, covariances=covariances)
    return own._replace(z=z / unit, mean=(own.mean - centre) / unit), theirs


def _mean_variance(own: Classes) -> jax.Array:
    """Return the mean variance of a feature over all rows that count."""
    counts = jnp.any(own.member > 0, axis=1)
    total = jnp.maximum(jnp.sum(counts), 1)
    mean = jnp.sum(own.z, axis=0, keepdims=True) / total
    (gaps,) = emptied(counts, own.z - mean)
    return jnp.sum(gaps**2) / (total * own.z.shape[1])
