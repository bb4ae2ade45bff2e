"""What older versions of our dependencies lack, in one place.

Each entry names the version that has the real thing: delete it when that one is the floor.
"""

from typing import Any

import jax
from flax import nnx

# flax < 0.12 has no nnx.List: there a module's attribute may be a plain list, with the same paths
# in its state.
List: Any = getattr(nnx, "List", list)


def set_value(variable: nnx.Variable, value: jax.Array) -> None:
    """Give a variable another value, also where it had but a shape.

    flax < 0.12 has no ``Variable.set_value``, and later ones deprecate setting ``value``.
    """
    if hasattr(nnx.Variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value
