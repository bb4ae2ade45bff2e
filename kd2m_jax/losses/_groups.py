"""Who may be matched with whom: one mask and one weight per sample make a metric conditional.

A conditional loss is its marginal twin called with other groups. There is no loop over classes
and no padding, so 1,000 classes cost what 10 do.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import class_labels

HIGHEST = jax.lax.Precision.HIGHEST


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


def centred(z_s: jax.Array, z_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both clouds moved by their common mean, a constant for the gradient.

    Squared distances by expansion, and means, lose their digits to a large common offset.
    """
    centre = (z_s.mean(0, keepdims=True) + z_t.mean(0, keepdims=True)) / 2
    centre = jax.lax.stop_gradient(centre)
    return z_s - centre, z_t - centre


def magnitude(*arrays: jax.Array, axis: int | None = None) -> jax.Array:
    """Return the power of two at the largest magnitude, a constant for the gradient; 1 for 0.

    Divided by it, numbers keep their digits, and their squares neither overflow nor vanish.
    """
    keep = axis is not None
    tops = [jnp.max(jnp.abs(jax.lax.stop_gradient(a)), axis=axis, keepdims=keep) for a in arrays]
    _, exponent = jnp.frexp(functools.reduce(jnp.maximum, tops))
    least = jnp.finfo(arrays[0].dtype).minexp
    return jnp.ldexp(jnp.ones((), arrays[0].dtype), jnp.maximum(exponent - 1, least))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def in_unit(length: Callable, unit: jax.Array, z: Any, *rest) -> jax.Array:
    """``length(z, *rest)``, which grows as z does, computed in a unit where squares are numbers."""
    return unit * length(jax.tree.map(lambda a: a / unit, z), *rest)


@in_unit.defjvp
def _(length, primals, tangents):
    unit, z, *rest = primals
    z = jax.tree.map(lambda a: a / unit, z)
    # The derivative of a length does not depend on the unit, whose square may be no number.
    value, slope = jax.jvp(lambda z: length(z, *rest), (z,), (tangents[1],))
    return unit * value, slope


def squared_distances(z_s: jax.Array, z_t: jax.Array) -> jax.Array:
    """``[n, m]`` of ``||z_s,i - z_t,j||^2`` by expansion: one matrix product.

    Not clipped at zero, where the gradient would be cut with the value; rounding may leave
    entries a few ulps of the squared norms below zero.
    """
    z_s, z_t = centred(z_s, z_t)
    norm_s, norm_t = (jnp.sum(z**2, 1, keepdims=True) for z in (z_s, z_t))
    # The norms as two more columns of the product: no other n x m array is made.
    left = jnp.concatenate([-2 * z_s, norm_s, jnp.ones_like(norm_s)], axis=1)
    right = jnp.concatenate([z_t, jnp.ones_like(norm_t), norm_t], axis=1)
    return jnp.matmul(left, right.T, precision=HIGHEST)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root whose gradient at 0 (a dead feature, coincident points) is 0, not infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0 * x)  # NaN stays NaN
