"""Who may be matched with whom: one mask and one weight per sample make a metric conditional.

A conditional loss is its marginal twin called with other groups. There is no loop over classes
and no padding, so 1,000 classes cost what 10 do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import class_labels
from kd2m_jax.losses._numerics import HIGHEST


class Groups(NamedTuple):
    """The groups of one batch: everyone together (``same`` is None), or the classes.

    Attributes:
      same: ``[n, n]`` bool, whether i and j are of one class; None where all are one group.
      size_s, size_t: ``[n]``, ``[m]``, how many samples the group of each sample has.
      count: how many groups are present, K.
    """

    same: jax.Array | None
    size_s: jax.Array
    size_t: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # of tuple

    @property
    def weight_s(self) -> jax.Array:
        """``[n]``, ``w_i = 1 / (K n_i)``: groups weigh the same, and so do a group's members."""
        return 1 / (self.count * self.size_s)

    @property
    def weight_t(self) -> jax.Array:
        """``[m]``, the same on the teacher's side."""
        return 1 / (self.count * self.size_t)

    def within(self, pairs: jax.Array, outside: float = 0.0) -> jax.Array:
        """``[n, m]`` values of pairs, those across groups replaced by ``outside``."""
        return pairs if self.same is None else jnp.where(self.same, pairs, outside)

    def mean(self, z: jax.Array) -> jax.Array:
        """Return the mean of each sample's group: ``[n, d]``, or ``[1, d]`` for a single group."""
        if self.same is None:
            return jnp.mean(z, axis=0, keepdims=True)
        return jnp.matmul(self.same.astype(z.dtype), z, precision=HIGHEST) / self.size_s[:, None]

    def middle(self, z: jax.Array) -> jax.Array:
        """Return a point amid each sample's group, like `mean` but in O(nd) and O(n^2) bits.

        For classes the midpoint of their first and last member: not a member, because there a row
        of inner products would be nothing but ties, which take an assignment 3 times as long.
        """
        if self.same is None:
            return jnp.mean(z, axis=0, keepdims=True)
        name = jnp.arange(z.shape[0], dtype=jnp.int32)[:, None]
        first = jnp.min(jnp.where(self.same, name, z.shape[0] - 1), axis=0)
        last = jnp.max(jnp.where(self.same, name, 0), axis=0)
        return (z[first] + z[last]) / 2

    def total(self, per_sample: jax.Array) -> jax.Array:
        """Return the sum over each sample's group: ``[n]``, or ``[1]`` for a single group."""
        if self.same is None:
            return jnp.sum(per_sample, keepdims=True)
        return jnp.matmul(self.same.astype(per_sample.dtype), per_sample, precision=HIGHEST)

    def average(self, per_group: jax.Array) -> jax.Array:
        """Mean over groups of a value that each member of a group repeats (as `mean` does)."""
        if self.same is None:
            return per_group[0]
        return jnp.sum(self.weight_s * per_group)


def everyone(n: int, m: int, dtype) -> Groups:
    """One group: n student and m teacher samples, uniform weights."""
    one = jnp.ones((), dtype)
    return Groups(None, jnp.full(n, n, dtype), jnp.full(m, m, dtype), one)


def by_class(labels: ArrayLike, n: int, dtype) -> Groups:
    """One group per class: teacher and student see the same batch, so they share the labels.

    A label below 0 is no class: it makes the number of groups, and with it every loss, NaN.
    """
    labels = class_labels(labels, n)
    same = labels[:, None] == labels[None, :]
    size = jnp.sum(same, axis=1, dtype=dtype)
    count = jnp.round(jnp.sum(1 / size))  # each class adds n_y terms of 1 / n_y
    count = jnp.where(jnp.all(labels >= 0), count, jnp.nan)
    return Groups(same, size, size, count)
