"""Checkpoints of a run: the last one to resume from, and the best one apart."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


class Checkpoints:
    """Two folders of orbax checkpoints under one: ``last`` (two kept) and ``best`` (one).

    Orbax writes into a temporary folder and renames it when it is whole, so a process killed
    while saving leaves the checkpoint before. Arrays come back to the bit.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = pathlib.Path(directory).absolute()

        def manager(name, kept):
            options = ocp.CheckpointManagerOptions(
                max_to_keep=kept, create=True, enable_async_checkpointing=False
            )
            return ocp.CheckpointManager(directory / name, options=options)

        self._last, self._best = manager("last", 2), manager("best", 1)

    def save(self, step: int, tree: Any, record: dict, *, best: bool) -> None:
        """Save a pytree and a JSON-able record as those of a step."""
        # Arrays under their place in the tree: a file that says what it holds, and no pytree
        # type of ours or of Flax's inside it.
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(_by_name(tree)), record=ocp.args.JsonSave(record)
        )
        self._last.save(step, args=args)
        if best:
            self._best.save(step, args=args)

    def restore(self, like: Any, *, best: bool = False) -> tuple[Any, dict] | None:
        """The last (or best) pytree and record, or None where nothing was saved yet.

        ``like`` is a pytree of the same structure. A ValueError says so if the saved one differs.
        """
        manager = self._best if best else self._last
        step = manager.latest_step()
        if step is None:
            return None
        named = _by_name(like)
        try:
            found = manager.restore(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardRestore(jax.tree.map(_abstract, named)),
                    record=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint in {manager.directory} is of another network or optimizer than "
                "this run's: resume with the settings it was made with, or use another folder"
            ) from error
        leaves = [found["tree"][name] for name in named]
        leaves = [_unpack(new, old) for new, old in zip(leaves, jax.tree.leaves(like), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), found["record"]

    def close(self) -> None:
        """Release orbax's threads."""
        self._last.close()
        self._best.close()


def _by_name(tree: Any) -> dict[str, jax.Array]:
    """Leaves by their path; typed PRNG keys as the integers they are made of."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _pack(x) for path, x in pairs}


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _pack(x):
    return jax.random.key_data(x) if _is_key(x) else x


def _unpack(new, old):
    return jax.random.wrap_key_data(new) if _is_key(old) else new


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
