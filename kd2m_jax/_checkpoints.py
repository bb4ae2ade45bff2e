"""Checkpoints of a run: the last one to resume from, and the best one apart."""

import logging
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from kd2m_jax._locks import CheckpointError

_JSON = ocp.args.JsonRestore()


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
        named = _by_name(tree)
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(named),
            record=ocp.args.JsonSave(record | {"arrays": _shapes(named)}),
        )
        # The best one first: killed in between, a resumed run comes to this epoch again and finds
        # it there already, the same to the bit.
        if best and step not in self._best.all_steps():
            self._best.save(step, args=args)
        if step in self._last.all_steps():  # stopped at an epoch's last step, before its evaluation
            self._last.delete(step)
        self._last.save(step, args=args)

    def restore(self, like: Any, *, best: bool = False) -> tuple[Any, dict] | None:
        """The last (or best) pytree and record that can be read, or None where there is none.

        ``like`` is a pytree of the same structure, on the devices where the result is to be. A
        CheckpointError says so if the saved one is another; a damaged one is passed over, which is
        logged, and removed.
        """
        manager = self._best if best else self._last
        named = _by_name(like)
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                record = manager.restore(step, args=ocp.args.Composite(record=_JSON))["record"]
                known = record.pop("arrays")
                same = known == _shapes(named)
                if same:
                    tree = ocp.args.StandardRestore(jax.tree.map(_abstract, named))
                    found = manager.restore(step, args=ocp.args.Composite(tree=tree))["tree"]
            except Exception as error:
                logging.getLogger(__name__).warning(
                    "the checkpoint of step %d in %s cannot be read (%s): the one before is used",
                    step,
                    manager.directory,
                    type(error).__name__,
                )
                manager.delete(step)
                continue
            if not same:
                raise CheckpointError(
                    f"the checkpoint in {manager.directory} is of another network or optimizer "
                    "than this run's: resume with the settings it was made with, or use another "
                    "folder"
                )
            leaves = [
                _unpack(found[name], old)
                for name, old in zip(named, jax.tree.leaves(like), strict=True)
            ]
            return jax.tree.unflatten(jax.tree.structure(like), leaves), record
        return None

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
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _shapes(named: dict[str, jax.Array]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in named.items()}
