"""Minima and single entries in the form that XLA:CPU runs fast inside a loop.

`_assignment` is made of loops whose body reads one row of the costs. Each form here was chosen by
measurement: the plain ``jnp.min``, ``argmin`` and ``.at[].set`` take several times as long there.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kd2m_jax._compat import one_like

INT = jnp.int32


def repeat(count, body, init):
    """``lax.fori_loop`` from 0, for a traced count and a body ``(k, state) -> state``."""
    return lax.fori_loop(jnp.int32(0), jnp.asarray(count, INT), body, init)


def take(array: jax.Array, i: jax.Array) -> jax.Array:
    """``array[i]`` without the wrapping of negative indices."""
    return lax.dynamic_index_in_dim(array, i, keepdims=False)


def put(array: jax.Array, i: jax.Array, value: jax.Array) -> jax.Array:
    """``array.at[i].set(value)``, in place where nothing else reads the array."""
    return lax.dynamic_update_slice(array, one_like(array, value), (i,))


# --- Floats as integers ------------------------------------------------------------------------
# XLA:CPU vectorises a minimum of integers to a scalar, and one of floats not (NaN): 4 times.


def unsigned(dtype):
    """Return the unsigned integer type of a float's size."""
    return np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")


def signed(dtype):
    """Return the signed integer type of a float's size."""
    return np.dtype(f"int{8 * np.dtype(dtype).itemsize}")


def bits(x: jax.Array) -> jax.Array:
    """Non-negative floats as unsigned integers, which are in the same order."""
    return lax.bitcast_convert_type(x, unsigned(x.dtype))


def as_signed(x: jax.Array) -> jax.Array:
    """Return the same bits as signed integers."""
    return lax.bitcast_convert_type(x, signed(x.dtype))


def flip_negative(x: jax.Array) -> jax.Array:
    """Signed bits of floats <-> integers in the order of the floats; it is its own inverse."""
    limits = np.iinfo(x.dtype)
    return x ^ ((x >> x.dtype.type(limits.bits - 1)) & x.dtype.type(limits.max))


# --- Minima ------------------------------------------------------------------------------------


def padded(n: int) -> int:
    """Return a row's length such that it can be cut into equal slices."""
    return n if n <= 32 else -(-n // 32) * 32


def cut(width: int) -> tuple[int, int]:
    """Return a row as at most 64 slices of at least 32 entries: how many, and how long."""
    count = min(64, width // 32) if width % 32 == 0 else 1
    count = next(c for c in range(max(count, 1), 0, -1) if width % c == 0)
    return count, width // count


def lower(a: jax.Array, b) -> jax.Array:
    """Return the lesser, b where either is NaN: one instruction, unlike ``jnp.minimum``."""
    return jnp.where(a < b, a, b)


def lanes(x: jax.Array) -> jax.Array:
    """Return the minimum over a row's slices, lane by lane: long minima without a reduction."""
    count, size = cut(x.size)
    parts = [x[k * size : (k + 1) * size] for k in range(count)]
    while len(parts) > 1:
        rest = [parts[-1]] if len(parts) % 2 else []
        parts = [lower(a, b) for a, b in zip(parts[:-1:2], parts[1::2], strict=True)] + rest
    return parts[0]


def few(x: jax.Array) -> jax.Array:
    """Return a short integer vector's minimum; XLA:CPU splits reductions of more than 32."""
    while x.size > 32 and x.size % 2 == 0:
        x = lower(x[: x.size // 2], x[x.size // 2 :])
    return jnp.min(x)


def least(x: jax.Array) -> jax.Array:
    """Return the minimum of a row of floats of any sign, without NaN."""
    return lax.bitcast_convert_type(flip_negative(few(flip_negative(as_signed(lanes(x))))), x.dtype)


def most(x: jax.Array) -> jax.Array:
    """Return the maximum of a row of floats of any sign, without NaN."""
    return -least(-x)


def first_of(x: jax.Array, value: jax.Array, names: jax.Array) -> jax.Array:
    """Return the least of ``names`` (0 to size - 1) where x has a value that it does have."""
    return few(jnp.where(x == value, names, names.dtype.type(x.size - 1)))


def slice_of(x: jax.Array, lane: jax.Array) -> jax.Array:
    """One lane's entry in each of a row's slices."""
    count, size = cut(x.size)
    return lax.dynamic_slice(x.reshape(count, size), (jnp.zeros_like(lane), lane), (count, 1))[:, 0]


def two_least(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where a short vector of floats is least, and its second least value."""
    infinity = x.dtype.type(np.inf)

    def merge(a, b):
        first = a[0] <= b[0]
        return (
            jnp.where(first, a[0], b[0]),
            jnp.where(first, a[1], b[1]),
            lower(jnp.where(first, b[0], a[0]), lower(a[2], b[2])),
        )

    start = (infinity, np.int32(0), infinity)
    operands = (x, lax.iota(INT, x.size), jnp.full_like(x, infinity))
    _, where, second = lax.reduce(operands, start, merge, (0,))
    return where, second
