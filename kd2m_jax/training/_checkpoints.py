"""Checkpoints of a run: the last one to resume from, and the best one apart."""

import json
import logging
import os
import pathlib
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kd2m_jax.errors import CheckpointError
from kd2m_jax.training._processes import by_first, is_first

_JSON = ocp.args.JsonRestore()


class Checkpoints:
    """Two folders of orbax checkpoints under one: ``last`` and ``best``, two kept of each.

    Orbax writes into a temporary folder and renames it when it is whole, so a process killed
    while saving leaves the checkpoint before. Arrays come back to the bit. Of several processes
    the first one writes and reads, and tells the others what it read.

    A reader leaves the folder as it is. A writer too, until it saves: then what it could not read
    is moved out of orbax's sight, for whoever can repair it.
    """

    def __init__(self, directory: str | os.PathLike, *, writing: bool = True):
        if not is_first():
            return
        directory = pathlib.Path(directory).absolute()
        self._writing, self._unreadable = writing, []

        def manager(name, kept):
            if writing:
                (directory / name).mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=kept,
                create=False,
                enable_async_checkpointing=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
            )
            return _Manager(directory / name, options=options)

        self._last, self._best = manager("last", 2), manager("best", 2)
        # The step that the best one was saved with, as the last one's record has it.
        self._best_step: int | None = None

    def save(self, step: int, tree: Any, record: dict, *, best: Any = None) -> None:
        """Save a pytree and a JSON-able record as those of a step; and what is best, if new.

        CheckpointError where that cannot be done: a full disk, a folder that is gone.
        """
        if not is_first():
            return
        try:
            self._save(step, tree, record, best)
        except Exception as error:  # orbax and its storage raise errors of many kinds
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"the run cannot be saved in {self._last.directory.parent}: "
                f"{reason or type(error).__name__}"
            ) from error

    def _save(self, step: int, tree: Any, record: dict, best: Any) -> None:
        for manager, unreadable in self._unreadable:
            path = manager.directory / str(unreadable)
            path.rename(f"{path}.unreadable-{time.time_ns()}")  # not a name of orbax's
            manager.reload()
        self._unreadable = []
        # The best one first: killed in between, the last one before still names its own best one,
        # and a resumed run comes here again and finds this one, the same to the bit.
        if best is not None:
            if step not in self._best.all_steps():
                self._best.save(step, args=_arguments(best, record))
            self._best_step = step
        record = record | {"best_step": self._best_step}
        if step in self._last.all_steps():  # saved at an epoch's last step, before its evaluation
            self._last.delete(step)
        self._last.save(step, args=_arguments(tree, record))

    def restore(self, like: Any, *, best: bool = False) -> tuple[Any, dict] | None:
        """Return the last (or best) pytree and record that can be read, or None.

        ``like`` is a pytree of the same structure, on the devices where the result is to be. A
        CheckpointError says so if the saved one is another; a damaged one is passed over, which is
        logged.
        """
        found = by_first(lambda: self._read(_by_name(like), best))
        if found is None:
            return None
        arrays, record = found
        leaves, structure = jax.tree.flatten(like)
        leaves = [_unpack(new, old) for new, old in zip(arrays.values(), leaves, strict=True)]
        return jax.tree.unflatten(structure, leaves), record

    def arrays(self, *, best: bool = False) -> tuple[dict[str, np.ndarray], dict] | None:
        """Return the last (or best) arrays that can be read, by their place, and their record."""
        found = by_first(lambda: self._read(None, best=False))  # it names the best one
        if best:
            found = by_first(lambda: self._read(None, best=True))
        return found

    def _read(
        self, named: dict[str, np.ndarray] | None, best: bool
    ) -> tuple[dict[str, np.ndarray], dict] | None:
        manager = self._best if best else self._last
        steps = sorted(manager.all_steps())
        if best and self._best_step is not None:
            steps = [step for step in steps if step == self._best_step]
        while steps:
            step = steps.pop()
            try:
                record = manager.restore(step, args=ocp.args.Composite(record=_JSON))["record"]
                if record.pop("sum", None) not in (None, _sum_of(record)):  # old ones have none
                    raise ValueError("the record is not the one that was saved")
                known = record.pop("arrays")
                shapes = {name: shape for name, (shape, _) in known.items()}
                same, found = named is None or shapes == _shapes(named), {}
                if same:
                    like = named or {name: _empty(shape) for name, shape in shapes.items()}
                    tree = ocp.args.StandardRestore(like)
                    found = manager.restore(step, args=ocp.args.Composite(tree=tree))["tree"]
                    # Orbax does not notice a bit that has changed on the disk.
                    if _sums(found) != {name: sum_ for name, (_, sum_) in known.items()}:
                        raise ValueError("the arrays are not those that were saved")
            except Exception as error:
                otherwise = "no earlier one"
                if self._writing and not best:
                    otherwise += ": starting from the beginning"
                logging.getLogger(__name__).warning(
                    "the checkpoint of step %d in %s cannot be read (%s): %s",
                    step,
                    manager.directory,
                    type(error).__name__,
                    "the one before is used" if steps else otherwise,
                )
                self._unreadable.append((manager, step))
                continue
            if not same:
                raise CheckpointError(
                    f"the checkpoint in {manager.directory} is of another network, optimizer or "
                    "average of the weights than this run's: resume with the settings it was made "
                    "with, or use another folder"
                )
            if not best:  # records from before November 2026 name none: then it is the newest
                self._best_step = record.get("best_step")
            return {name: found[name] for name in named or found}, record
        return None

    def close(self) -> None:
        """Release orbax's threads."""
        if is_first():
            self._last.close()
            self._best.close()


class _Manager(ocp.CheckpointManager):
    """One that leaves the question for SIGTERM to `asked_to_stop`.

    Orbax asks JAX at each save, with the step for a number. JAX says yes once, at the number after
    the highest that the processes asked with last: behind a step of orbax's, our own numbers, which
    are smaller, might never come to it.
    """

    def reached_preemption(self, step: int) -> bool:
        """Say no."""
        return False


def _arguments(tree: Any, record: dict):
    # Arrays under their place in the tree: a file that says what it holds, and no pytree type of
    # ours or of Flax's inside it.
    named = _by_name(tree)
    shapes, sums = _shapes(named), _sums(named)
    arrays = {name: [shapes[name], sums[name]] for name in named}
    record = record | {"arrays": arrays}
    return ocp.args.Composite(
        tree=ocp.args.StandardSave(named),
        record=ocp.args.JsonSave(record | {"sum": _sum_of(record)}),
    )


def _sum_of(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _by_name(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by their path, on the host; typed PRNG keys as the integers they are made of."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _pack(x) for path, x in pairs}


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _pack(x):
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def _unpack(new, old):
    new = jax.random.wrap_key_data(new) if _is_key(old) else new
    return jax.device_put(new, old.sharding)


def _shapes(named: dict[str, np.ndarray]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in named.items()}


def _empty(shape: str) -> np.ndarray:
    """Return an array like the one that `_shapes` describes: "float32[3, 4]"."""
    dtype, _, sizes = shape.partition("[")
    return np.empty([int(n) for n in sizes.rstrip("]").split(",") if n], jnp.dtype(dtype))


def _sums(named: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: zlib.crc32(x.tobytes()) for name, x in named.items()}
