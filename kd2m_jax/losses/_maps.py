"""Losses between feature maps: between channels (nst), and between cells of the image (wkd_f)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import (
    Maps,
    choice,
    emptied,
    integer,
    kept_rows,
    loss,
    number,
    row_mean,
    shown,
    stage_maps,
)
from kd2m_jax.losses._groups import everyone
from kd2m_jax.losses._mmd import KERNELS, mmd_of
from kd2m_jax.losses._numerics import magnitude, safe_sqrt


@loss
def nst(
    maps_s: Maps,
    maps_t: Maps,
    *,
    kernel: str = "polynomial",
    degree: int = 2,
    offset: float = 0.0,
    stages: int | tuple[int, ...] | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Neuron selectivity transfer: the channels of an image as a sample of what neurons look at.

    ``sum_stages 1/n sum_i MMD^2(C_S,i, C_T,i)``, where the points of C_i are image i's channels,
    each an ``h w``-vector of length 1, and MMD^2 is that of `mmd`: a channel of the student need
    not resemble a given one of the teacher, and there may be more or fewer. Where h and w differ,
    the larger map is averaged over blocks of positions down to the smaller. A channel that is 0
    everywhere stays 0.

    The published loss is ``CE + lambda/2 MMD^2`` with the polynomial kernel and lambda = 50:
    ``coef=25``.

    Cost: time O(n c^2 h w), memory O(n (c_S + c_T)^2), with the linear kernel, which compares the
    mean maps, O(n (c_S + c_T) h w). Written position by position, over all pairs of channels, it
    takes O(n c_S c_T h w). Measured (temporary memory of value and gradient, as XLA's CPU
    compiler plans it, polynomial kernel, 8 x 8 maps): n = 64, 64 and 256 channels, 17 MiB against
    391; n = 128, 256 and 256 channels, 201 MiB against 6,216.

    Args:
      maps_s: the student's stages, first stage first, each ``[n, h, w, c]`` float. An array is a
        single stage.
      maps_t: the teacher's, of the same examples; h, w and c may differ from the student's.
      kernel: "linear", "polynomial" or "rbf" (Gaussian; sigma^2 is the mean squared distance
        between an image's channels of both networks, a constant for the gradient).
      degree: 1 to 64, integer, of "polynomial".
      offset: >= 0, of "polynomial".
      stages: which stages are matched, an index (from the end if negative) or a tuple of them,
        whose losses are added; None for the last.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

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
    per_image, keep = [], None
    for stage in chosen:
        x, y = stage_maps(maps_s, maps_t, stage)
        keep = kept_rows(where, len(x), len(y))
        x, y = emptied(keep, x, y)
        h, w = (min(x.shape[axis], y.shape[axis]) for axis in (1, 2))
        x, y = _channels("maps_s", x, h, w), _channels("maps_t", y, h, w)
        groups = everyone(x.shape[1], y.shape[1], x.dtype)
        options = (groups, kernel, "mean", degree, offset, False)
        per_image.append(jax.vmap(lambda x, y, options=options: mmd_of(x, y, *options))(x, y))
    return row_mean(functools.reduce(jnp.add, per_image), keep)


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


@loss
def wkd_f(
    maps_s: Maps,
    maps_t: Maps,
    *,
    grid: int = 1,
    mean_coef: float = 4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Wasserstein distance between Gaussians of an image's feature map, cell by cell (WKD-F).

    The last stage's map of each image is cut into g x g cells; the positions of a cell are a
    sample of a Gaussian with diagonal covariance, and
    ``1/(n g^2) sum_images,cells (gamma ||mu_S - mu_T||^2 + ||sigma_S - sigma_T||^2)`` with
    ``sigma = sqrt(var + 1e-5)``, var unbiased (0 where a cell is a single position). With
    gamma = 1 that is the mean squared 2-Wasserstein distance.

    Published for resnet32x4 -> resnet8x4 on CIFAR-100: ``coef=0.08``, gamma = 4, g = 1, the
    student's map through a projector (1x1 convolution, BatchNorm, ReLU), and coef decaying by a
    cosine after epoch 150 of 240, as in the example.

    Cost: O(n h w c).

    Args:
      maps_s: the student's stages, each ``[n, h, w, c]`` float; the last is used. An array is a
        single stage.
      maps_t: the teacher's, of the same examples; h and w may differ from the student's.
      grid: >= 1, g; it must divide the heights and widths.
      mean_coef: >= 0, gamma, the weight of the means.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

    Returns:
      Scalar, a *squared* distance (for gamma = 1), float32 (float64 for float64 maps).

    Raises:
      ValueError: channels or numbers of examples that differ, a grid that does not divide the
        maps, an option out of range.
      TypeError: maps that are not floating point.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> maps = jnp.arange(32.0).reshape(2, 4, 4, 1)
      >>> print(f"{wkd_f(maps + 1, maps):.2f}")  # gamma 1^2
      4.00
      >>> epoch = 391  # steps
      >>> coef = optax.join_schedules(
      ...     [optax.constant_schedule(0.08), optax.cosine_decay_schedule(0.08, 90 * epoch)],
      ...     [150 * epoch],
      ... )
      >>> print(f"{coef(150 * epoch):.2f} {coef(195 * epoch):.2f} {coef(240 * epoch):.2f}")
      0.08 0.04 0.00

    References:
      Lv, Yang & Li, Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
      Distillation, NeurIPS 2024 (arXiv 2412.08139).
    """
    grid = integer("grid", grid)
    number("mean_coef", mean_coef, positive=False)
    maps_s, maps_t = stage_maps(maps_s, maps_t, -1)
    if maps_s.shape[3] != maps_t.shape[3]:
        raise ValueError(
            f"maps_s has {maps_s.shape[3]} channels and maps_t has {maps_t.shape[3]}: bring the "
            "student's to the teacher's with a projector, or use losses.nst, which compares maps "
            "of unequal channels"
        )
    keep = kept_rows(where, len(maps_s), len(maps_t))
    maps_s, maps_t = emptied(keep, maps_s, maps_t)  # which are equal then
    count = len(maps_s) if keep is None else jnp.maximum(jnp.sum(keep), 1)
    mean_s, std_s = _cells("maps_s", maps_s, grid)
    mean_t, std_t = _cells("maps_t", maps_t, grid)
    total = mean_coef * jnp.sum((mean_s - mean_t) ** 2) + jnp.sum((std_s - std_t) ** 2)
    return total / (count * grid**2)


def _cells(name: str, maps: jax.Array, grid: int) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation over each cell's positions: ``[n, g, 1, g, 1, c]``."""
    n, h, w, c = maps.shape
    if h % grid or w % grid:
        raise ValueError(f"grid={grid} must divide {name}' height and width, got {h} x {w}")
    cells = maps.reshape(n, grid, h // grid, grid, w // grid, c)
    mean = jnp.mean(cells, axis=(2, 4), keepdims=True)
    positions = h * w // grid**2
    var = jnp.sum((cells - mean) ** 2, axis=(2, 4), keepdims=True) / max(positions - 1, 1)
    return mean, jnp.sqrt(var + 1e-5)
