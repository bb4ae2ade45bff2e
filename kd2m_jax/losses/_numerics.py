"""Arithmetic that several losses share: distances, roots, centring, units, double precision."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd2m_jax._compat import enable_x64

# Accelerators multiply matrices with less by default, and distances by expansion lose all to it.
HIGHEST = jax.lax.Precision.HIGHEST


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


def in_double(function: Callable) -> Callable:
    """In float64, with results in the first argument's type; constants for the gradient.

    JAX transforms an operation by the width that is set when it does so: what changes the width
    inside a program has no derivative, and `jax.vmap` must find its own way in here.
    """

    @jax.custom_batching.custom_vmap
    def call(x, *rest):
        with enable_x64(True):
            double = jax.tree.map(_widened, (x, *rest))
            return jax.tree.map(lambda a: a.astype(x.dtype), function(*double))

    @call.def_vmap
    def _(size, batched, *given):
        del size
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        found = in_double(jax.vmap(function, in_axes=tuple(axes)))(*given)
        return found, jax.tree.map(lambda _: True, found)

    return call


def _widened(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a
