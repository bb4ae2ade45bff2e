"""Distances between clouds of the same examples, up to a rotation: procrustes, gram, cka.

All three compare X and Y: rows centred and divided by sqrt(n), so that ``X^T X`` is a covariance.
Columns are never compared with one another, so the two networks' feature sizes may differ.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import clouds, filled, kept_rows, loss
from kd2m_jax.losses._groups import everyone
from kd2m_jax.losses._numerics import HIGHEST, in_double, magnitude
from kd2m_jax.losses._polar import unmatched

_dot = functools.partial(jnp.matmul, precision=HIGHEST)


@loss
def procrustes(z_s: ArrayLike, z_t: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    r"""Squared Procrustes distance: `l2` of centred features after the best rotation.

    ``min_Q ||X - Y Q||_F^2 = ||X||_F^2 + ||Y||_F^2 - 2 ||X^T Y||_*`` over orthogonal Q,
    reflections among them, where X and Y are the features, rows centred and divided by sqrt(n).
    Features of unequal sizes are compared as if the narrower ones had further columns of zeros.
    Rotating or moving either cloud changes nothing; scaling one does.

    Zero means that all inner products of centred features agree. It does not mean that a
    classifier of the teacher fits the student's features: those live in a space of their own.

    Cost: for d < n time O(n d^2), memory O(n d); else O(n^2 d) and O(n d).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, e]`` float, the teacher's features of the same examples; e may differ from d.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

    Returns:
      Scalar, a *squared* distance, float32 (float64 for float64 features). First and second
      derivatives are available, third ones raise. Where ``X^T Y`` lacks rank the nuclear norm has
      many subgradients: its null directions are left out, which is the shortest of them.

    Raises:
      ValueError: features that are not ``[n, d]`` arrays, unequal numbers of rows.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[1.0, 0.0], [0.0, 2.0], [-1.0, -2.0]])
      >>> turned = z @ jnp.array([[0.0, 1.0], [-1.0, 0.0]]) + 3
      >>> longer = procrustes(2 * turned, z)  # |X|^2, which is 10/3
      >>> print(f"{procrustes(turned, z):.4f} {longer:.4f}")
      0.0000 3.3333

    References:
      Schonemann, Psychometrika 1966; between networks Williams et al., NeurIPS 2021; as a loss
      Bhattarai et al., arXiv 2509.25253.
    """
    x, y = _rows(z_s, z_t, where)
    # Transposed, features take the place of examples: the same polar factor, and what it chooses
    # where singular values vanish, as in the Gaussian W2.
    return unmatched(x.T, y.T, everyone(x.shape[1], y.shape[1], x.dtype))


@loss
def gram(z_s: ArrayLike, z_t: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    r"""Squared distance between Gram matrices: the inner products of all pairs of examples.

    ``||X X^T - Y Y^T||_F^2 = 1/n^2 sum_ij (<x_i, x_j> - <y_i, y_j>)^2`` with centred features
    x and y, whose rows divided by sqrt(n) are X and Y. Like `procrustes` it does not see
    rotations, and is 0 where that is; it weighs directions by their variance once more, so that
    directions of large variance rule.

    The similarity-preserving loss of Tung & Mori is this one of features that are not centred,
    with each row of both n x n matrices divided by its length. So that one does not see a scale,
    of an example neither, and this one does.

    Cost: for d < n time O(n d^2), memory O(n d); else O(n^2 d) and O(n^2).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, e]`` float, the teacher's features of the same examples; e may differ from d.
      where: as in `procrustes`.

    Returns:
      Scalar, a *squared* distance between products of features, so the fourth power of their unit,
      float32 (float64 for float64 features).

    Raises:
      ValueError: features that are not ``[n, d]`` arrays, unequal numbers of rows.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[-1.0], [1.0]])
      >>> print(f"{gram(2 * z, z):.4f}")  # products of 4 and -4 for 1 and -1
      9.0000

    References:
      Bhattarai et al., arXiv 2509.25253; Tung & Mori, ICCV 2019.
    """
    return _gap(*_rows(z_s, z_t, where))


@loss
def cka(z_s: ArrayLike, z_t: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    r"""One minus the linear centred kernel alignment of the two networks' features.

    ``1 - ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)``, the biased form, between 0 and 1: X and Y
    are the features with centred rows. It is half of `gram` with both Gram matrices brought to
    length 1, and is computed so. It sees neither a rotation of a cloud nor its scale.

    Zero leaves the geometry open in directions of small variance, more than `procrustes` and
    `gram` do: the largest ones rule the quotient.

    Cost: for d < n time O(n d^2), memory O(n d); else O(n^2 d) and O(n^2).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, e]`` float, the teacher's features of the same examples; e may differ from d.
      where: as in `procrustes`.

    Returns:
      Scalar, dimensionless, float32 (float64 for float64 features). A network whose features are
      all equal has no direction: the value is 1 against any other, 0 against another such one,
      with a gradient of 0.

    Raises:
      ValueError: features that are not ``[n, d]`` arrays, unequal numbers of rows.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
      >>> print(f"{cka(3 * z + 1, z):.4f} {cka(z[:, :1], z):.4f}")  # 1 - 1 / sqrt(2)
      0.0000 0.2929

    References:
      Kornblith, Norouzi, Lee & Hinton, ICML 2019.
    """
    x, y = _rows(z_s, z_t, where)
    (x, flat_s), (y, flat_t) = (_of_length_one(z) for z in (x, y))
    # The gap of one that has a length to one that has none is 1.
    return _gap(x, y) / 2 + jnp.where(flat_s ^ flat_t, 0.5, 0)


def _rows(z_s: ArrayLike, z_t: ArrayLike, where: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    """Return X and Y: rows centred and divided by sqrt(n), those that do not count 0."""
    z_s, z_t = clouds(z_s, z_t, paired=True, one_space=False)
    n = len(z_s)
    keep = kept_rows(where, n, n)
    groups, first = everyone(n, n, z_s.dtype, keep), 0 if keep is None else jnp.argmax(keep)

    def rows(z):
        # Seen from one of them, equal rows are zeros, which a mean that is rounded does not give.
        z = z - jax.lax.stop_gradient(z[first])[None]
        return groups.kept_s(z - groups.mean_s(z)) * jnp.sqrt(groups.weight_s)[:, None]

    x, y = (rows(z) for z in filled(keep, z_s, z_t))
    return x, y


def _gap(x: jax.Array, y: jax.Array) -> jax.Array:
    """``||X X^T - Y Y^T||_F^2``."""
    if max(x.shape[1], y.shape[1]) < len(x):
        return _gap_over_features(x, y)
    return jnp.sum((_dot(x, x.T) - _dot(y, y.T)) ** 2)


@jax.custom_jvp
def _gap_over_features(x: jax.Array, y: jax.Array) -> jax.Array:
    """``||X^T X||_F^2 + ||Y^T Y||_F^2 - 2 ||X^T Y||_F^2``: the same without an n x n matrix.

    Near equality float32 would leave nothing of that difference, so it is taken in float64. Where
    that is emulated (TPUs) rounding is 3e-7 of the squares: 10% of the value at a gap of 1e-3.
    """
    double = in_double(_difference)
    return jax.lax.platform_dependent(
        x, y, cpu=double, cuda=double, rocm=double, default=_difference
    )


@_gap_over_features.defjvp
def _(primals, tangents):
    x, y = primals
    x_y = _dot(x.T, y)
    slope_x, slope_y = _dot(x, _dot(x.T, x)) - _dot(y, x_y.T), _dot(y, _dot(y.T, y)) - _dot(x, x_y)
    slope = jnp.sum(slope_x * tangents[0]) + jnp.sum(slope_y * tangents[1])
    return _gap_over_features(x, y), 4 * slope


def _difference(x: jax.Array, y: jax.Array) -> jax.Array:
    own, other, both = (jnp.sum(_dot(a.T, b) ** 2) for a, b in ((x, x), (y, y), (x, y)))
    return own + other - 2 * both


def _of_length_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return X with ``||X X^T||_F = 1``, and whether it is 0, and stays so."""
    x = x / magnitude(x)  # where fourth powers are numbers
    inner = _dot(x.T, x) if x.shape[1] < len(x) else _dot(x, x.T)
    square = jnp.sum(inner**2)
    flat = square == 0
    return x * jnp.where(flat, 1, square) ** -0.25, flat
