"""Who may be matched with whom: one mask and one weight per sample make a metric conditional.

A conditional loss is its marginal twin called with other groups. There is no loop over classes
and no padding, so 1,000 classes cost what 10 do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd2m_jax.losses._checks import emptied
from kd2m_jax.losses._numerics import HIGHEST


class Groups(NamedTuple):
    """The groups of one batch: everyone together (``same`` is None), or the classes.

    Attributes:
      same: ``[n, n]`` bool, whether i and j are of one class; None where all are one group.
      size_s, size_t: ``[n]``, ``[m]``, how many samples the group of each sample has.
      count: how many groups are present, K.
      keep: ``[n]`` bool, which rows of both sides count, or None for all. The others weigh
        nothing. Where there are classes, they are a group of their own.
    """

    same: jax.Array | None
    size_s: jax.Array
    size_t: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # of tuple
    keep: jax.Array | None = None

    @property
    def weight_s(self) -> jax.Array:
        """``[n]``, ``w_i = 1 / (K n_i)``: groups weigh the same, and so do a group's members."""
        return self.kept(1 / (self.count * self.size_s))

    @property
    def weight_t(self) -> jax.Array:
        """``[m]``, the same on the teacher's side."""
        return self.kept(1 / (self.count * self.size_t))

    @property
    def mass_s(self) -> jax.Array:
        """``[n]``, what a solver takes for weights: > 0 for rows that do not count, too."""
        return self._positive(self.weight_s)

    @property
    def mass_t(self) -> jax.Array:
        """``[m]``, the same on the teacher's side."""
        return self._positive(self.weight_t)

    def _positive(self, weight: jax.Array) -> jax.Array:
        return weight if self.keep is None else jnp.where(self.keep, weight, 2**-20 / len(weight))

    def kept(self, rows: jax.Array) -> jax.Array:
        """Return rows ``[n, ...]`` with zeros in the places of those that do not count."""
        return emptied(self.keep, rows)[0]

    def separated(self) -> "Groups":
        """Return these groups with a mask wherever some rows may not be matched with others."""
        if self.keep is None or self.same is not None:
            return self
        same = self.keep[:, None] == self.keep[None, :]
        size = jnp.sum(same, axis=1, dtype=self.size_s.dtype)
        return self._replace(same=same, size_s=size, size_t=size)

    def within(self, pairs: jax.Array, outside: float = 0.0) -> jax.Array:
        """``[n, m]`` values of pairs, those across groups replaced by ``outside``."""
        return pairs if self.same is None else jnp.where(self.same, pairs, outside)

    def mean(self, z: jax.Array) -> jax.Array:
        """Return the mean of each sample's group: ``[n, d]``, or ``[1, d]`` for a single group."""
        if self.same is None and self.keep is None:
            return jnp.mean(z, axis=0, keepdims=True)
        if self.same is None:
            return jnp.sum(self.kept(z), axis=0, keepdims=True) / self.size_s[0]
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


def everyone(n: int, m: int, dtype, keep: jax.Array | None = None) -> Groups:
    """One group: n student and m teacher samples, uniform weights."""
    one = jnp.ones((), dtype)
    if keep is None:
        return Groups(None, jnp.full(n, n, dtype), jnp.full(m, m, dtype), one)
    size = jnp.broadcast_to(jnp.maximum(jnp.sum(keep, dtype=dtype), 1), n)
    return Groups(None, size, size, one, keep)


def by_class(labels: jax.Array, keep: jax.Array, dtype) -> Groups:
    """One group per class: teacher and student see the same batch, so they share the labels.

    A label below 0 of a row that counts is no class: it makes the number of groups, and with it
    every loss, NaN.
    """
    labels = jnp.where(keep, labels, -1)
    same = labels[:, None] == labels[None, :]
    size = jnp.sum(same, axis=1, dtype=dtype)
    # Each class adds n_y terms of 1 / n_y. Without any all weights are 0.
    count = jnp.maximum(jnp.round(jnp.sum(jnp.where(keep, 1 / size, 0))), 1)
    count = jnp.where(jnp.all((labels >= 0) | ~keep), count, jnp.nan)
    return Groups(same, size, size, count, keep)
