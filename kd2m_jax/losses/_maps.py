"""Losses between feature maps that keep their place in the image: wkd_f."""

import jax
import jax.numpy as jnp

from kd2m_jax.losses._checks import Maps, integer, loss, number, stage_maps


@loss
def wkd_f(maps_s: Maps, maps_t: Maps, *, grid: int = 1, mean_coef: float = 4.0) -> jax.Array:
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
    mean_s, std_s = _cells("maps_s", maps_s, grid)
    mean_t, std_t = _cells("maps_t", maps_t, grid)
    total = mean_coef * jnp.sum((mean_s - mean_t) ** 2) + jnp.sum((std_s - std_t) ** 2)
    return total / (maps_s.shape[0] * grid**2)


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
