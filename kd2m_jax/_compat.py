"""What older versions of our dependencies lack, in one place.

Each entry names the version that has the real thing: delete it when that one is the floor. Flax is
imported inside, because the losses use this file too and load no Flax.
"""

from collections.abc import Iterable, MutableSequence
from typing import Any

import jax

# jax < 0.8 has it in jax.experimental alone, and later ones not there.
enable_x64: Any = getattr(jax, "enable_x64", None)
if enable_x64 is None:
    from jax.experimental import enable_x64  # pyright: ignore


def layer_list(layers: Iterable[Any] = ()) -> MutableSequence[Any]:
    """Make a list of layers that may be an attribute of a module.

    flax < 0.12 has no ``nnx.List``: there it may be a plain list, with the same paths in its state.
    """
    from flax import nnx

    return getattr(nnx, "List", list)(layers)


def set_value(variable: Any, value: jax.Array) -> None:
    """Give an ``nnx.Variable`` another value, also where it had but a shape.

    flax < 0.12 has no ``Variable.set_value``, and later ones deprecate setting ``value``.
    """
    if hasattr(type(variable), "set_value"):
        variable.set_value(value)
    else:
        variable.value = value
