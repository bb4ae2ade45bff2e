"""What is left of a teacher where its images are gone: means, covariances and shares of classes."""

from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import choice, class_labels, matrix

COVARIANCES = ("full", "diagonal")


class ClassStatistics(NamedTuple):
    """A Gaussian per class: what `class_statistics` makes of a teacher's features. A pytree.

    Attributes:
      means: ``[K, d]``.
      covariances: ``[K, d, d]``, or ``[K, d]`` of variances; divided by n.
      shares: ``[K]``, the classes' shares of the examples; 0 for a class without any.

    Example:
      >>> import jax.numpy as jnp
      >>> z, labels = jnp.array([[0.0], [2.0], [5.0], [5.0]]), jnp.array([0, 0, 1, 1])
      >>> found = class_statistics(z, labels)
      >>> print(found.means[:, 0], found.covariances[:, 0, 0], found.shares)
      [1. 5.] [1. 0.] [0.5 0.5]
    """

    means: jax.Array
    covariances: jax.Array
    shares: jax.Array

    def marginal(self) -> "ClassStatistics":
        """Return the mixture's mean and covariance, as those of a single class.

        ``mu = sum_y pi_y mu_y`` and ``S = sum_y pi_y (S_y + (mu_y - mu)(mu_y - mu)^T)``.
        """
        shares = self.shares / jnp.sum(self.shares)
        mean = jnp.sum(shares[:, None] * self.means, axis=0, keepdims=True)
        gaps = self.means - mean
        within = jnp.tensordot(shares, self.full(), axes=1)
        between = jnp.einsum("k,kd,ke->de", shares, gaps, gaps, precision="highest")
        return ClassStatistics(mean, (within + between)[None], jnp.ones_like(shares[:1]))

    def full(self) -> jax.Array:
        """``[K, d, d]``, the covariances as matrices."""
        if self.covariances.ndim == 3:
            return self.covariances
        return self.covariances[:, :, None] * jnp.eye(self.means.shape[1])[None]

    def variances(self) -> jax.Array:
        """``[K, d]``, each feature's variance in each class."""
        if self.covariances.ndim == 2:
            return self.covariances
        return jnp.diagonal(self.covariances, axis1=1, axis2=2)

    def roots(self) -> jax.Array:
        """``[K, d, d]``, matrices R with ``R^T R = S``."""
        values, vectors = jnp.linalg.eigh(self.full())
        return jnp.sqrt(jnp.maximum(values, 0))[:, :, None] * jnp.swapaxes(vectors, 1, 2)

    def draw(self, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        """Draw n rows and their classes: features ``[n, d]`` and labels ``[n]``."""
        of_class, of_row = jax.random.split(key)
        labels = jax.random.categorical(of_class, jnp.log(self.shares), shape=(n,))
        noise = jax.random.normal(of_row, (n, self.means.shape[1]), self.means.dtype)
        if self.covariances.ndim == 2:
            spread = noise * jnp.sqrt(self.covariances)[labels]
        else:
            spread = jnp.einsum("nd,nde->ne", noise, self.roots()[labels], precision="highest")
        return self.means[labels] + spread, labels


def class_statistics(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    covariance: str = "full",
    num_classes: int | None = None,
) -> ClassStatistics:
    """Compute the mean, the covariance and the share of every class of a teacher's features.

    Done once, outside `jax.jit`, in float64. They take the teacher's place in `gaussian_w2`,
    `gaussian_cw2`, `gaussian_kl` and `gaussian_ckl`, and as ``teacher`` of `kd2m_jax.fit`.

    Args:
      features: ``[n, d]`` float.
      labels: ``[n]`` integers >= 0, their classes. Rows of -1 are left out.
      covariance: "full", or "diagonal" for variances alone, which need d instead of d^2 numbers.
      num_classes: how many classes there are, K; by default the largest label plus one.

    Returns:
      `ClassStatistics` of ``[K, d]`` means, ``[K, d, d]`` (or ``[K, d]``) covariances and ``[K]``
      shares, float32 (float64 for float64 features).

    Raises:
      ValueError: shapes that do not match, no row with a class, labels out of range, an unknown
        covariance.
      TypeError: labels that are not integers or are traced, features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.0, 0.0], [2.0, 4.0], [9.0, 9.0]])
      >>> print(class_statistics(z, jnp.array([0, 0, -1]), covariance="diagonal").covariances)
      [[1. 4.]]
    """
    choice("covariance", covariance, COVARIANCES)
    z = matrix("features", features)
    labels = class_labels(labels, z.shape[0])
    if isinstance(z, jax.core.Tracer) or isinstance(labels, jax.core.Tracer):
        raise TypeError("class_statistics is computed once, before training: call it outside jit")
    dtype, z, y = z.dtype, np.asarray(z, np.float64), np.asarray(labels)
    if y.max() < 0:
        raise ValueError("no row has a class: all labels are below 0")
    known = int(y.max()) + 1 if num_classes is None else num_classes
    if y.min() < -1 or y.max() >= known:
        raise ValueError(
            f"labels must be class numbers below {known}, or -1, got {y.min()} to {y.max()}"
        )
    means, spreads = np.zeros((known, z.shape[1])), []
    for c in range(known):
        rows = z[y == c]
        means[c] = rows.mean(0) if len(rows) else 0
        gaps = rows - means[c]
        spread = (gaps**2).sum(0) if covariance == "diagonal" else gaps.T @ gaps
        spreads.append(spread / max(len(rows), 1))
    shares = np.bincount(y[y >= 0], minlength=known) / (y >= 0).sum()
    return ClassStatistics(*(jnp.asarray(a, dtype) for a in (means, spreads, shares)))
