"""Maximum mean discrepancy: between features (mmd, cmmd) and between channels' maps (nst)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import (
    Maps,
    choice,
    clouds,
    integer,
    loss,
    number,
    shown,
    stage_maps,
)
from kd2m_jax.losses._groups import (
    HIGHEST,
    Groups,
    by_class,
    everyone,
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
) -> jax.Array:
    r"""Squared maximum mean discrepancy between two feature distributions.

    ``MMD^2 = mean k(s, s') + mean k(t, t') - 2 mean k(s, t)`` over all pairs, i = j included (the
    biased estimate, which is never negative), for one of the kernels

    - "linear": ``x . y``; the squared distance between the means;
    - "polynomial": ``(x . y + offset)^degree``; by default means and second moments;
    - "rbf": ``exp(-||x - y||^2 / (2 sigma^2))``; at most 2;
    - "energy": ``-||x - y||``; the energy distance ``2 E||s - t|| - E||s - s'|| - E||t - t'||``,
      which has no parameter.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n.
      kernel: "linear", "polynomial", "rbf" or "energy".
      bandwidth: sigma of "rbf": a number in the features' unit, or "mean" or "median", whose
        square is that of the squared distances between the n + m points of both clouds, each
        pair of distinct points once; a constant for the gradient.
      degree: >= 1, integer, of "polynomial".
      offset: >= 0, of "polynomial".

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
    groups = everyone(z_s.shape[0], z_t.shape[0], z_s.dtype)
    return _mmd(z_s, z_t, groups, kernel, bandwidth, degree, offset)


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
) -> jax.Array:
    r"""`mmd` within each class, averaged over the K classes present in the batch.

    ``1/K sum_y MMD^2(P_S(Z|Y=y), P_T(Z|Y=y))``, computed at once. The bandwidth is one for all
    classes: that of `mmd`, over the whole batch.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples.
      labels: ``[n]`` integers >= 0, their classes; others make the loss NaN.
      kernel: "linear", "polynomial", "rbf" or "energy", as in `mmd`.
      bandwidth: as in `mmd`.
      degree: as in `mmd`.
      offset: as in `mmd`.

    Returns:
      Scalar, a *squared* discrepancy as in `mmd`, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, an unknown kernel or bandwidth, an option out of range.
      TypeError: labels that are not integers, features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z_t = jnp.array([[0.0], [2.0], [5.0]])
      >>> z_s = jnp.array([[2.0], [0.0], [6.0]])
      >>> print(f"{cmmd(z_s, z_t, jnp.array([0, 0, 1]), kernel='linear'):.1f}")  # (0 + 1^2) / 2
      0.5

    References:
      `mmd`, made conditional as KD2M's CW2 is.
    """
    z_s, z_t = clouds(z_s, z_t, paired=True)
    groups = by_class(labels, z_s.shape[0], z_s.dtype)
    return _mmd(z_s, z_t, groups, kernel, bandwidth, degree, offset)


@loss
def nst(
    maps_s: Maps,
    maps_t: Maps,
    *,
    kernel: str = "polynomial",
    degree: int = 2,
    offset: float = 0.0,
    stages: int | tuple[int, ...] | None = None,
) -> jax.Array:
    r"""Neuron selectivity transfer: the channels of an image as a sample of what neurons look at.

    ``sum_stages 1/n sum_i MMD^2(C_S,i, C_T,i)``, where the points of C_i are image i's channels,
    each an ``h w``-vector of length 1, and MMD^2 is that of `mmd`: a channel of the student need
    not resemble a given one of the teacher, and there may be more or fewer. Where h and w differ,
    the larger map is averaged over blocks of positions down to the smaller. A channel that is 0
    everywhere stays 0.

    The published loss is ``CE + lambda/2 MMD^2`` with the polynomial kernel and lambda = 50:
    ``coef=25``. It takes memory O(n (c_S + c_T)^2), and O(n (c_S + c_T) h w) with the linear
    kernel, which compares the mean maps. Written position by position, over all pairs of channels,
    it takes O(n c_S c_T h w). Measured (temporary memory of value and gradient, as XLA's CPU
    compiler plans it, polynomial kernel, 8 x 8 maps): n = 64, 64 and 256 channels, 21 MiB against
    391; n = 128, 256 and 256 channels, 241 MiB against 6,216.

    Args:
      maps_s: the student's stages, first stage first, each ``[n, h, w, c]`` float. An array is a
        single stage.
      maps_t: the teacher's, of the same examples; h, w and c may differ from the student's.
      kernel: "linear", "polynomial" or "rbf" (Gaussian; sigma^2 is the mean squared distance
        between an image's channels of both networks, a constant for the gradient).
      degree: >= 1, integer, of "polynomial".
      offset: >= 0, of "polynomial".
      stages: which stages are matched, an index (from the end if negative) or a tuple of them,
        whose losses are added; None for the last.

    Returns:
      Scalar, a *squared* discrepancy without unit, float32 (float64 for float64 maps).

    Raises:
      ValueError: numbers of examples that differ, heights or widths of which neither divides the
        other, a stage that is not there, an unknown kernel, an option out of range.
      TypeError: maps that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> top = jnp.zeros((1, 4, 4, 1)).at[0, 0].set(1.0)
      >>> left = top.swapaxes(1, 2)
      >>> both = jnp.concatenate([top, left, left], axis=3)
      >>> print(f"{nst((both,), (top,), kernel='linear'):.4f}")  # |2/3 (left - top)|^2
      0.6667

    References:
      Huang & Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer,
      arXiv 1707.01219.
    """
    choice("kernel", kernel, KERNELS[:3])
    chosen = (-1,) if stages is None else stages if isinstance(stages, tuple) else (stages,)
    if not chosen:
        raise ValueError("stages must name at least one stage, got none")
    if not all(isinstance(stage, int | np.integer) for stage in chosen):
        raise ValueError(f"stages must be a whole number or several, got {shown(stages)}")
    per_image = []
    for stage in chosen:
        x, y = stage_maps(maps_s, maps_t, stage)
        h, w = (min(x.shape[axis], y.shape[axis]) for axis in (1, 2))
        x, y = _channels("maps_s", x, h, w), _channels("maps_t", y, h, w)
        groups = everyone(x.shape[1], y.shape[1], x.dtype)
        options = (groups, kernel, "mean", degree, offset)
        per_image.append(jax.vmap(lambda x, y, options=options: _mmd(x, y, *options))(x, y))
    return jnp.mean(sum(per_image[1:], per_image[0]))


def _channels(name: str, maps: jax.Array, h: int, w: int) -> jax.Array:
    """``[n, c, h w]``, each channel's map, averaged down to h x w and brought to length 1."""
    n, height, width, c = maps.shape
    if height % h or width % w:
        raise ValueError(
            f"{name} of {height} x {width} cannot be averaged over whole blocks to {h} x {w}: "
            "choose a stage whose sizes divide"
        )
    maps = maps.reshape(n, h, height // h, w, width // w, c).mean(axis=(2, 4))
    rows = maps.reshape(n, h * w, c).swapaxes(1, 2)
    rows = rows / magnitude(rows, axis=2)  # whose square may be no number
    norm = safe_sqrt(jnp.sum(rows**2, axis=2, keepdims=True))
    return rows / jnp.where(norm > 0, norm, 1)


def _mmd(
    z_s: jax.Array,
    z_t: jax.Array,
    groups: Groups,
    kernel: str,
    bandwidth: str | float,
    degree: int,
    offset: float,
) -> jax.Array:
    choice("kernel", kernel, KERNELS)
    number("offset", offset, positive=False)
    degree = integer("degree", degree)
    if isinstance(bandwidth, str):
        choice("bandwidth", bandwidth, BANDWIDTHS)
    else:
        number("bandwidth", bandwidth)
        number("bandwidth^2", bandwidth**2)
    k = _kernel(z_s, z_t, kernel, bandwidth, degree, offset)
    if kernel != "polynomial":
        # The others do not see a translation, each class by its own: a tight one keeps its digits.
        centre = jax.lax.stop_gradient((groups.mean(z_s) + groups.mean(z_t)) / 2)
        z_s, z_t = z_s - centre, z_t - centre
    if k is None:  # linear: the means say all
        gap = groups.mean(z_s) - groups.mean(z_t)
        return groups.average(jnp.sum(gap**2, axis=1))
    k_ss, k_tt, k_st = k(z_s, z_s), k(z_t, z_t), k(z_s, z_t)
    a, b = groups.weight_s[:, None], groups.weight_t[:, None]
    # Each group's pairs weigh (1 / n_y) (1 / n_y) / K.
    if k_ss.shape == k_tt.shape:
        # The same weights on both sides: what cancels does so before it is summed.
        pairs = (k_ss - k_st) + (k_tt - k_st.T)
        return groups.count * jnp.sum(groups.within(pairs) * (a * a.T))
    return jnp.sum(k_ss * (a * a.T)) + jnp.sum(k_tt * (b * b.T)) - 2 * jnp.sum(k_st * (a * b.T))


def _kernel(
    z_s: jax.Array, z_t: jax.Array, name: str, bandwidth: str | float, degree: int, offset: float
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """``k(x, y)`` -> ``[n, m]``, up to a constant: weights that add up to 0 do not see it."""
    if name == "polynomial":
        return lambda x, y: (jnp.matmul(x, y.T, precision=HIGHEST) + offset) ** degree
    if name == "energy":
        return lambda x, y: -safe_sqrt(_exact_squared_distances(x, y))
    if name == "rbf":
        sigma2 = jax.lax.stop_gradient(_bandwidth2(z_s, z_t, bandwidth))
        # Less 1, so that close points keep their digits.
        return lambda x, y: jnp.expm1(-_exact_squared_distances(x, y) / (2 * sigma2))
    return None


def _bandwidth2(z_s: jax.Array, z_t: jax.Array, bandwidth: str | float) -> jax.Array | float:
    """sigma^2 of the Gaussian kernel."""
    if not isinstance(bandwidth, str):
        return bandwidth**2
    z = jnp.concatenate([z_s, z_t])
    if bandwidth == "median":
        i, j = jnp.triu_indices(z.shape[0], 1)
        sigma2 = jnp.median(squared_distances(z, z)[i, j])
    else:
        spread = jnp.sum((z - jnp.mean(z, axis=0, keepdims=True)) ** 2)
        sigma2 = 2 * spread / (z.shape[0] - 1)
    # All points equal: stay above the square of their rounding errors.
    info = jnp.finfo(z.dtype)
    return jnp.maximum(sigma2, info.eps**2 * jnp.mean(jnp.sum(z**2, axis=1)) + info.tiny**0.5)


def _exact_squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """``[n, m]``, with its value from differences and its gradient from the expansion.

    An expansion is off by ulps of the squared norms, which the energy distance's root blows up
    between close points. Differences are exact there, and fuse into their sum without an
    [n, m, d] array, which their backward pass would hold (measured, n = m = d = 512, the energy
    distance with its gradient: 1.6 GB and 3,900 ms so, 9 MB and 60 ms with the expansion's).
    """
    # The barrier keeps XLA from sharing one cloud's broadcast among the three blocks: in memory.
    x0, y0 = jax.lax.optimization_barrier(jax.lax.stop_gradient((x, y)))
    exact = jnp.sum((x0[:, None, :] - y0[None, :, :]) ** 2, axis=2)
    inner = jnp.matmul(x, y.T, precision=HIGHEST)
    expanded = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1)[None, :] - 2 * inner
    return exact + (expanded - jax.lax.stop_gradient(expanded))
