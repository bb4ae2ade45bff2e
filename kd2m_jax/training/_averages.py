"""Moving averages of a network's variables, and what keeps a state as it was."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def averaged(average: Any, new: Any, kept: ArrayLike) -> Any:
    """Return the moving average with a new value; what is not floating point is the new one's."""

    def mean(a, b):
        floating = jnp.issubdtype(b.dtype, jnp.floating)
        return (kept * a + (1 - kept) * b).astype(a.dtype) if floating else b

    return jax.tree.map(mean, average, in_full(new))


def in_full(tree: Any) -> Any:
    """Return floats in float32 at least: in half precision an average would not move."""

    def full(a):
        floating = jnp.issubdtype(a.dtype, jnp.floating)
        return a.astype(jnp.promote_types(a.dtype, jnp.float32)) if floating else a

    return jax.tree.map(full, tree)


def like(new: Any, old: Any) -> Any:
    """Return a state with the structure and dtypes that it had, so that a step compiles once.

    What a call adds (sown intermediates, say) is left out.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(old)
    found = dict(jax.tree_util.tree_leaves_with_path(new))
    leaves = [jnp.asarray(found.get(path, leaf)) for path, leaf in pairs]
    leaves = [
        x if x.dtype == leaf.dtype else x.astype(leaf.dtype)
        for x, (_, leaf) in zip(leaves, pairs, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)
