"""Maximum mean discrepancy between features: mmd, cmmd."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import (
    apart_labels,
    choice,
    clouds,
    emptied,
    filled,
    integer,
    kept_rows,
    labelled_rows,
    loss,
    number,
)
from kd2m_jax.losses._groups import Groups, by_class, by_classes_apart, everyone
from kd2m_jax.losses._kernels import (
    distance_pairs,
    exact_squares,
    polynomial_pairs,
    with_slope_of,
)
from kd2m_jax.losses._numerics import (
    HIGHEST,
    centred,
    in_unit,
    magnitude,
    safe_sqrt,
    squared_distances,
)

KERNELS = ("linear", "polynomial", "rbf", "energy")
BANDWIDTHS = ("mean", "median")


@loss
def mmd(
    z_s: ArrayLike,
    z_t: ArrayLike,
    *,
    kernel: str = "rbf",
    bandwidth: str | float = "mean",
    degree: int = 2,
    offset: float = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Squared maximum mean discrepancy between two feature distributions.

    ``MMD^2 = mean k(s, s') + mean k(t, t') - 2 mean k(s, t)`` over all pairs, i = j included (the
    biased estimate, which is never negative), for one of the kernels

    - "linear": ``x . y``; the squared distance between the means;
    - "polynomial": ``(x . y + offset)^degree``; by default means and second moments;
    - "rbf": ``exp(-||x - y||^2 / (2 sigma^2))``; at most 2;
    - "energy": ``-||x - y||``; the energy distance ``2 E||s - t|| - E||s - s'|| - E||t - t'||``,
      which has no parameter.

    Where m = n, row i of both is usually the same example: what agrees of two such rows is left
    out before it is rounded, so that the value is right to 1e-4 however near the clouds are, and
    for a polynomial of features with a large common part (degree 2: steps of 1e-3 around 100).

    Between other examples (a bank) it does not know of classes, as `w2` does not: not for a student
    with a fresh head, nor where the classes' shares differ. `cmmd` with ``labels_t`` does.

    Cost: time O(n^2 d), memory O(n^2); with the linear kernel O(n d) and O(d).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n.
      kernel: "linear", "polynomial", "rbf" or "energy".
      bandwidth: sigma of "rbf": a number in the features' unit, or "mean" or "median", whose
        square is that of the squared distances between the n + m points of both clouds, each
        pair of distinct points once; a constant for the gradient.
      degree: 1 to 64, integer, of "polynomial".
      offset: >= 0, of "polynomial".
      where: ``[n]`` bool, the rows that count, for m = n; None for all. A row that does not is
        as if it were not there, on both sides, whatever it holds.

    Returns:
      Scalar, a *squared* discrepancy in the unit of the kernel (for "energy" that of a distance),
      float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, an unknown kernel or bandwidth, an option out of range.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z_t = jnp.array([[0.0], [2.0]])
      >>> for kernel in ("linear", "energy"):
      ...     print(f"{mmd(z_t + 2, z_t, kernel=kernel):.1f}")
      4.0
      2.0

    References:
      Gretton et al., A Kernel Two-Sample Test, JMLR 2012 (the biased estimate); energy: Szekely &
      Rizzo, J. Stat. Plan. Inference 2013, and Sejdinovic et al., Ann. Stat. 2013, for the kernel.
    """
    z_s, z_t = clouds(z_s, z_t)
    keep = kept_rows(where, len(z_s), len(z_t))
    z_s, z_t = filled(keep, z_s, z_t)
    groups = everyone(len(z_s), len(z_t), z_s.dtype, keep)
    return mmd_of(z_s, z_t, groups, kernel, bandwidth, degree, offset)


@loss
def cmmd(
    z_s: ArrayLike,
    z_t: ArrayLike,
    labels: ArrayLike,
    *,
    kernel: str = "rbf",
    bandwidth: str | float = "mean",
    degree: int = 2,
    offset: float = 1.0,
    labels_t: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""`mmd` within each class, averaged over the K classes present in the batch.

    ``1/K sum_y MMD^2(P_S(Z|Y=y), P_T(Z|Y=y))``, computed at once. The bandwidth is one for all
    classes: that of `mmd`, over the whole batch.

    Cost: time O(n^2 d), memory O(n^2), whatever the number of classes.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples.
      labels: ``[n]`` integers >= 0, their classes. A row of -1 is left out; other numbers make
        the loss NaN.
      kernel: "linear", "polynomial", "rbf" or "energy", as in `mmd`.
      bandwidth: as in `mmd`.
      degree: as in `mmd`.
      offset: as in `mmd`.
      labels_t: as in `cw2`, where the teacher's rows are of other examples.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

    Returns:
      Scalar, a *squared* discrepancy as in `mmd`, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, an unknown kernel or bandwidth, an option out of range.
      TypeError: labels that are not integers, features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z_t = jnp.array([[0.0], [2.0], [5.0]])
      >>> z_s = jnp.array([[2.0], [0.0], [6.0]])
      >>> labels = jnp.array([0, 0, 1])
      >>> print(f"{cmmd(z_s, z_t, labels, kernel='linear'):.1f}")  # (0 + 1^2) / 2
      0.5

    References:
      `mmd`, made conditional as KD2M's CW2 is.
    """
    if labels_t is not None:
        z_s, z_t = clouds(z_s, z_t)
        labels, labels_t = apart_labels(labels, labels_t, where, len(z_s), len(z_t))
        groups = by_classes_apart(labels, labels_t, z_s.dtype)
        (z_s,), (z_t,) = filled(groups.keep, z_s), filled(groups.keep_t, z_t)
        return mmd_of(z_s, z_t, groups, kernel, bandwidth, degree, offset, False)
    z_s, z_t = clouds(z_s, z_t, paired=True)
    labels, keep = labelled_rows(labels, where, len(z_s))
    z_s, z_t = filled(keep, z_s, z_t)
    groups = by_class(labels, keep, z_s.dtype)
    return mmd_of(z_s, z_t, groups, kernel, bandwidth, degree, offset)


def mmd_of(
    z_s: jax.Array,
    z_t: jax.Array,
    groups: Groups,
    kernel: str,
    bandwidth: str | float,
    degree: int,
    offset: float,
    paired: bool = True,
) -> jax.Array:
    """``paired``: where n = m, row i of both is usually the same example (see `_kernels`)."""
    choice("kernel", kernel, KERNELS)
    number("offset", offset, positive=False)
    degree = integer("degree", degree)
    if degree > 64:
        raise ValueError(f"degree must be at most 64, got {degree}")
    if isinstance(bandwidth, str):
        choice("bandwidth", bandwidth, BANDWIDTHS)
    else:
        number("bandwidth", bandwidth)
    if kernel == "polynomial":
        return _polynomial(z_s, z_t, groups, degree, offset, paired)
    unit = _unit(z_s, z_t, groups, kernel, bandwidth)
    # The others do not see a translation, each class by its own: a tight one keeps its digits.
    centre = jax.lax.stop_gradient((groups.mean_s(z_s) + groups.mean_t_at_s(z_t)) / 2)
    z_s, z_t = z_s - centre, z_t - groups.at_t(centre)
    if kernel == "linear":  # the means say all
        gap = groups.mean_s(z_s) - groups.mean_t_at_s(z_t)
        return groups.average(jnp.sum(gap**2, axis=1))
    if kernel == "energy":
        length = functools.partial(_by_distance, kernel="energy", paired=paired)
        return in_unit(length, unit, (z_s, z_t), groups)
    return _by_distance((z_s / unit, z_t / unit), groups, kernel="rbf", paired=paired)


def _unit(
    z_s: jax.Array, z_t: jax.Array, groups: Groups, kernel: str, bandwidth: str | float
) -> jax.Array:
    """Return what features are divided by: sqrt(2) sigma of "rbf", near the clouds' size else."""
    eps = jnp.finfo(z_s.dtype).eps
    # Where all points are equal, what is left is rounding, or 0.
    size = magnitude(*centred(z_s, z_t), eps * z_s, eps * z_t)
    if kernel != "rbf":
        return size
    if isinstance(bandwidth, str):
        sigma2 = _bandwidth2(z_s / size, z_t / size, groups, bandwidth)
        return jax.lax.stop_gradient(size * jnp.sqrt(2 * sigma2))
    return jnp.asarray(2**0.5 * bandwidth, z_s.dtype)


def _bandwidth2(z_s: jax.Array, z_t: jax.Array, groups: Groups, bandwidth: str) -> jax.Array:
    """sigma^2 of the Gaussian kernel."""
    z = jnp.concatenate([z_s, z_t])
    if groups.keep is not None and groups.keep_t is not None:
        keep = jnp.concatenate([groups.keep, groups.keep_t])
        sigma2 = _kept_bandwidth2(z, keep, bandwidth)
        return _above_rounding(sigma2, z)
    if bandwidth == "median":
        i, j = jnp.triu_indices(z.shape[0], 1)
        sigma2 = jnp.median(squared_distances(z, z)[i, j])
    else:
        spread = jnp.sum((z - jnp.mean(z, axis=0, keepdims=True)) ** 2)
        sigma2 = 2 * spread / (z.shape[0] - 1)
    return _above_rounding(sigma2, z)


def _kept_bandwidth2(z: jax.Array, keep: jax.Array, bandwidth: str) -> jax.Array:
    """Return the same of the rows that count."""
    if bandwidth == "median":
        i, j = jnp.triu_indices(z.shape[0], 1)
        squares = jnp.where(keep[i] & keep[j], squared_distances(z, z)[i, j], jnp.nan)
        return jnp.where(jnp.any(keep), jnp.nanmedian(squares), 0)
    count = jnp.sum(keep, dtype=z.dtype)
    mean = jnp.sum(emptied(keep, z)[0], axis=0, keepdims=True) / jnp.maximum(count, 1)
    spread = jnp.sum(emptied(keep, z - mean)[0] ** 2)
    return 2 * spread / jnp.maximum(count - 1, 1)


def _above_rounding(sigma2: jax.Array, z: jax.Array) -> jax.Array:
    """Where all points are equal, stay above the square of their rounding errors."""
    info = jnp.finfo(z.dtype)
    return jnp.maximum(sigma2, info.eps**2 * jnp.mean(jnp.sum(z**2, axis=1)) + info.tiny**0.5)


def _pair_weights(groups: Groups) -> jax.Array:
    """``count w_i w_j`` within groups: each group's pairs weigh ``(1 / n_y) (1 / n_y) / K``."""
    a = groups.weight_s
    if groups.same is None and groups.keep is None:
        return a[0] ** 2
    return groups.count * groups.within(a[:, None] * groups.weight_t[None, :])


def _blocks(groups: Groups, k_ss: jax.Array, k_tt: jax.Array, k_st: jax.Array) -> jax.Array:
    """Return the three means, of rows that have nothing to do with each other."""
    if groups.same is not None:
        sides = groups.of_students(), groups.of_teachers(), groups
        sums = [
            jnp.sum(_pair_weights(side) * k)
            for side, k in zip(sides, (k_ss, k_tt, k_st), strict=True)
        ]
        return sums[0] + sums[1] - 2 * sums[2]
    if k_ss.shape == k_tt.shape:  # what cancels does so before it is summed
        return jnp.mean((k_ss - k_st) + (k_tt - k_st.T))
    return jnp.mean(k_ss) + jnp.mean(k_tt) - 2 * jnp.mean(k_st)


def _by_distance(
    clouds: tuple[jax.Array, jax.Array], groups: Groups, *, kernel: str, paired: bool
) -> jax.Array:
    """MMD^2 for ``exp(-|x - y|^2)`` or ``-|x - y|``."""
    x, y = clouds
    if paired and x.shape == y.shape:
        return distance_pairs(kernel, x, y, _pair_weights(groups))

    def k(x, y):
        squares = _exact_squared_distances(x, y)
        # Less 1, so that close points keep their digits.
        return jnp.expm1(-squares) if kernel == "rbf" else -safe_sqrt(squares)

    return _blocks(groups, k(x, x), k(y, y), k(x, y))


def _polynomial(
    x: jax.Array, y: jax.Array, groups: Groups, degree: int, offset: float, paired: bool
) -> jax.Array:
    """MMD^2 for ``(x . y + offset)^degree``, which sees where the clouds are."""
    if paired and x.shape == y.shape:
        return jnp.sum(_pair_weights(groups) * polynomial_pairs(x, x - y, degree, offset))
    # Around the value c at the common mean, (c + e)^p = c^p + p c^(p-1) e + the rest: the first
    # term cancels, and the second leaves the distance between the means.
    mean = (
        jax.lax.stop_gradient(
            jnp.mean(x, axis=0, keepdims=True) + jnp.mean(y, axis=0, keepdims=True)
        )
        / 2
    )
    x, y = x - mean, y - mean
    c = jnp.sum(mean**2) + offset

    def rest(x, y):
        e = jnp.matmul(x + mean, y.T, precision=HIGHEST) + jnp.matmul(x, mean.T, precision=HIGHEST)
        return sum(
            (math.comb(degree, k) * c ** (degree - k) * e**k for k in range(2, degree + 1)),
            jnp.zeros_like(e),
        )

    gap = groups.average(jnp.sum((groups.mean_s(x) - groups.mean_t_at_s(y)) ** 2, axis=1))
    blocks = _blocks(groups, rest(x, x), rest(y, y), rest(x, y))
    return degree * c ** (degree - 1) * gap + blocks


def _exact_squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """``[n, m]``, with its value from differences and its gradient from the expansion.

    An expansion is off by ulps of the squared norms, which the energy distance's root blows up
    between close points. Differences are exact there, and fuse into their sum without an
    [n, m, d] array, which their backward pass would hold (measured, n = m = d = 512, the energy
    distance with its gradient: 1.6 GB and 3,900 ms so, 9 MB and 60 ms with the expansion's).
    """
    exact = exact_squares(*jax.lax.stop_gradient((x, y)))
    inner = jnp.matmul(x, y.T, precision=HIGHEST)
    expanded = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1)[None, :] - 2 * inner
    return with_slope_of(expanded, exact)
