"""Who may be matched with whom: one mask and one weight per sample make a metric conditional.

A conditional loss is its marginal twin called with other groups. There is no loop over classes
and no padding, so 1,000 classes cost what 10 do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd2m_jax.losses._checks import emptied
from kd2m_jax.losses._numerics import HIGHEST


class Apart(NamedTuple):
    """What differs between the sides where each has rows and labels of its own.

    Attributes:
      same_s, same_t: ``[n, n]``, ``[m, m]``, who is of one class on each side.
      keep_t: ``[m]``, which rows of the teacher's side count.
      teachers: ``[n]``, how many teacher samples the group of each student sample has.
      students: ``[m]``, the reverse.
    """

    same_s: jax.Array
    same_t: jax.Array
    keep_t: jax.Array
    teachers: jax.Array
    students: jax.Array


class Groups(NamedTuple):
    """The groups of one batch: everyone together (``same`` is None), or the classes.

    Attributes:
      same: ``[n, m]`` bool, whether student i and teacher j are of one class; None where all are
        one group.
      size_s, size_t: ``[n]``, ``[m]``, how many samples of its own side each sample's group has.
      count: how many groups are present, K.
      keep: ``[n]`` bool, which rows of the student's side count, and of the teacher's unless they
        are apart; None for all. The others weigh nothing. Where there are classes, they are a
        group of their own.
      apart: None where row i of both sides is the same example, or there is one group.
    """

    same: jax.Array | None
    size_s: jax.Array
    size_t: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # of tuple
    keep: jax.Array | None = None
    apart: Apart | None = None

    @property
    def same_s(self) -> jax.Array | None:
        """``[n, n]``, who is of one class on the student's side."""
        return self.same if self.apart is None else self.apart.same_s

    @property
    def same_t(self) -> jax.Array | None:
        """``[m, m]``, the same on the teacher's side."""
        return self.same if self.apart is None else self.apart.same_t

    @property
    def keep_t(self) -> jax.Array | None:
        """``[m]``, which rows of the teacher's side count."""
        return self.keep if self.apart is None else self.apart.keep_t

    @property
    def weight_s(self) -> jax.Array:
        """``[n]``, ``w_i = 1 / (K n_i)``: groups weigh the same, and so do a group's members."""
        return self.kept_s(1 / (self.count * self.size_s))

    @property
    def weight_t(self) -> jax.Array:
        """``[m]``, the same on the teacher's side."""
        return self.kept_t(1 / (self.count * self.size_t))

    @property
    def mass_s(self) -> jax.Array:
        """``[n]``, what a solver takes for weights: > 0 for rows that do not count, too."""
        return _positive(self.weight_s, self.keep)

    @property
    def mass_t(self) -> jax.Array:
        """``[m]``, the same on the teacher's side."""
        return _positive(self.weight_t, self.keep_t)

    def kept_s(self, rows: jax.Array) -> jax.Array:
        """Return rows ``[n, ...]`` with zeros in the places of those that do not count."""
        return emptied(self.keep, rows)[0]

    def kept_t(self, rows: jax.Array) -> jax.Array:
        """Return rows ``[m, ...]`` likewise."""
        return emptied(self.keep_t, rows)[0]

    def separated(self) -> "Groups":
        """Return these groups with a mask wherever some rows may not be matched with others."""
        if self.keep is None or self.same is not None:
            return self
        same = self.keep[:, None] == self.keep[None, :]
        size = jnp.sum(same, axis=1, dtype=self.size_s.dtype)
        return self._replace(same=same, size_s=size, size_t=size)

    def swapped(self) -> "Groups":
        """Return the groups with the teacher in the student's place."""
        swapped = self._replace(size_s=self.size_t, size_t=self.size_s)
        if self.apart is None or self.same is None:
            return swapped
        same_s, same_t, keep_t, teachers, students = self.apart
        assert self.keep is not None
        apart = Apart(same_t, same_s, self.keep, students, teachers)
        return swapped._replace(same=self.same.T, keep=keep_t, apart=apart)

    def of_students(self) -> "Groups":
        """Return the student's side against itself."""
        return self._replace(same=self.same_s, size_t=self.size_s, apart=None)

    def of_teachers(self) -> "Groups":
        """Return the teacher's side against itself."""
        return self._replace(same=self.same_t, size_s=self.size_t, keep=self.keep_t, apart=None)

    def within(self, pairs: jax.Array, outside: float = 0.0) -> jax.Array:
        """``[n, m]`` values of pairs, those across groups replaced by ``outside``."""
        return pairs if self.same is None else jnp.where(self.same, pairs, outside)

    def mean_s(self, z: jax.Array) -> jax.Array:
        """Return the student's mean in each student's group: ``[n, d]``; ``[1, d]`` for one."""
        return _mean(z, self.same_s, self.size_s, self.keep)

    def mean_t(self, z: jax.Array) -> jax.Array:
        """Return the teacher's mean in each teacher's group: ``[m, d]``; ``[1, d]`` for one."""
        return _mean(z, self.same_t, self.size_t, self.keep_t)

    def mean_t_at_s(self, z: jax.Array) -> jax.Array:
        """Return the teacher's mean in each *student's* group, ``[n, d]``; ``[1, d]`` for one."""
        if self.apart is None:
            return self.mean_t(z)
        # Rows that do not count are of no class that counts.
        return _mean(z, self.same, self.apart.teachers, self.apart.keep_t)

    def middle(self, z: jax.Array) -> jax.Array:
        """Return a point amid each sample's group, like a mean but in O(nd) and O(n^2) bits.

        For classes the midpoint of their first and last member: not a member, because there a row
        of inner products would be nothing but ties, which take an assignment 3 times as long.
        """
        if self.same is None:
            return jnp.mean(z, axis=0, keepdims=True)
        name = jnp.arange(z.shape[0], dtype=jnp.int32)[:, None]
        first = jnp.min(jnp.where(self.same, name, z.shape[0] - 1), axis=0)
        last = jnp.max(jnp.where(self.same, name, 0), axis=0)
        return (z[first] + z[last]) / 2

    def total_s(self, per_sample: jax.Array) -> jax.Array:
        """Return the sum over each student's group: ``[n]``, or ``[1]`` for a single group."""
        return _total(per_sample, self.same_s)

    def total_t_at_s(self, per_sample: jax.Array) -> jax.Array:
        """Return the sum of teachers over each student's group: ``[n]``, or ``[1]`` for one."""
        return _total(per_sample, self.same)

    def at_t(self, per_group: jax.Array) -> jax.Array:
        """Return at the teacher's samples what each student of their group repeats."""
        if self.apart is None or self.same is None:
            return per_group
        students = self.apart.students.reshape(-1, *[1] * (per_group.ndim - 1))
        return _total(per_group, self.same.T) / students

    def average(self, per_group: jax.Array) -> jax.Array:
        """Mean over groups of a value that each student of a group repeats (as `mean_s` does)."""
        if self.same is None:
            return per_group[0]
        return jnp.sum(self.weight_s * per_group)


def _positive(weight: jax.Array, keep: jax.Array | None) -> jax.Array:
    return weight if keep is None else jnp.where(keep, weight, 2**-20 / len(weight))


def _mean(z, same, size, keep) -> jax.Array:
    if same is None and keep is None:
        return jnp.mean(z, axis=0, keepdims=True)
    if same is None:
        return jnp.sum(emptied(keep, z)[0], axis=0, keepdims=True) / size[0]
    return jnp.matmul(same.astype(z.dtype), z, precision=HIGHEST) / size[:, None]


def _total(per_sample: jax.Array, same: jax.Array | None) -> jax.Array:
    if same is None:
        return jnp.sum(per_sample, keepdims=True)
    return jnp.matmul(same.astype(per_sample.dtype), per_sample, precision=HIGHEST)


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


def by_classes_apart(labels: jax.Array, labels_t: jax.Array, dtype) -> Groups:
    """One group per class that is on both sides, each of which has labels of its own.

    A class on one side alone is left out; -1 is no class, and a label below it makes all NaN.
    """
    across = labels[:, None] == labels_t[None, :]
    keep = ((labels >= 0) & jnp.any(across, axis=1)) | (labels < -1)
    keep_t = ((labels_t >= 0) & jnp.any(across, axis=0)) | (labels_t < -1)
    # What is left out is one group of its own, with -1 for its name.
    named, named_t = jnp.where(keep, labels, -1), jnp.where(keep_t, labels_t, -1)

    def same_and_size(one, other):
        same = one[:, None] == other[None, :]
        return same, jnp.maximum(jnp.sum(same, axis=1, dtype=dtype), 1)

    same_s, size_s = same_and_size(named, named)
    same_t, size_t = same_and_size(named_t, named_t)
    same, teachers = same_and_size(named, named_t)
    _, students = same_and_size(named_t, named)
    count = jnp.maximum(jnp.round(jnp.sum(jnp.where(keep, 1 / size_s, 0))), 1)
    known = jnp.all(labels >= -1) & jnp.all(labels_t >= -1)
    count = jnp.where(known, count, jnp.nan)
    apart = Apart(same_s, same_t, keep_t, teachers, students)
    return Groups(same, size_s, size_t, count, keep, apart)
