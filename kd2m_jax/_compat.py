"""What versions of our dependencies lack, in one place.

Each entry names the version that has the real thing: delete it when that one is the floor. Flax is
imported inside, because the losses use this file too and load no Flax.
"""

from collections.abc import Iterable, MutableSequence
from typing import Any

import jax
import jax.numpy as jnp

# jax < 0.8 has it in jax.experimental alone, and later ones not there.
enable_x64: Any = getattr(jax, "enable_x64", None)
if enable_x64 is None:
    from jax.experimental import enable_x64  # pyright: ignore


def one_like(array: jax.Array, value: jax.Array) -> jax.Array:
    """Return ``[1]`` with this value, of an array's dtype and placed as it is.

    full_like of jax < 0.8 fails on a value that varies over the devices of a shard_map; there
    arrays of an explicit mesh are not supported.
    """
    if jax.__version_info__ < (0, 8):
        return jnp.asarray(value, array.dtype).reshape(1)
    return jnp.full_like(array, value, shape=(1,))


def layer_list(layers: Iterable[Any] = ()) -> MutableSequence[Any]:
    """Make a list of layers that may be an attribute of a module.

    flax < 0.12 has no ``nnx.List``: there it may be a plain list, with the same paths in its state.
    """
    from flax import nnx

    return getattr(nnx, "List", list)(layers)


def set_value(variable: Any, value: jax.Array) -> None:
    """Give an ``nnx.Variable`` another value, even if it only had a shape.

    flax < 0.12 has no ``Variable.set_value``, and later ones deprecate setting ``value``.
    """
    if hasattr(type(variable), "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


def forget(program: Any) -> None:
    """Let go of a compiled program's code, whoever else still holds the program.

    From jax 0.8 on, what ``jax.pmap`` keeps of a function holds that function, so that nothing is
    ever freed, and it has no ``clear_cache`` of its own.
    """
    if hasattr(program, "clear_cache"):
        program.clear_cache()
        return
    try:
        from jax._src.pmap import _cached_shard_map
    except ImportError:  # another jax: then there is nothing to let go, or no way to
        return
    evict = getattr(_cached_shard_map, "evict_function", None)
    if evict is not None and hasattr(program, "__wrapped__"):
        evict(program.__wrapped__)
