"""What older versions of our dependencies lack, in one place.

Each entry names the version that has the real thing: delete it when that one is the floor.
"""

from typing import Any

from flax import nnx

# flax < 0.12 has no nnx.List: there a module's attribute may be a plain list, with the same paths
# in its state.
List: Any = getattr(nnx, "List", list)
