"""Somebody's iterable of batches: read epoch by epoch, in the background."""

import contextlib
import itertools
import queue
import sys
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax.training._body import Batch
from kd2m_jax.training._examples import examples, is_array, parts

_AHEAD = 2  # batches that wait on the host, at most
_THREADS = 8  # of grain, each with a batch in hand


def are_arrays(data: Any) -> bool:
    """Tell arrays from an iterable of batches: a pair or a dict with an array in it."""
    if isinstance(data, Mapping):
        return True
    given = data if isinstance(data, tuple) and len(data) in (2, 3) else ()
    return any(part is None or is_array(part) for part in given)


def length(data: Any) -> int | None:
    """Return how many batches an epoch has; None where it does not say, or never ends."""
    try:
        batches = len(data)
    except TypeError:
        return None
    return None if batches == sys.maxsize else batches


def first_batch(what: str, data: Any, *, any_labels: bool = False) -> Batch:
    """Return the first batch; ValueError where there is none, or it is none."""
    if is_array(data):
        raise ValueError(
            f"{what} must be (x, labels) or an iterable of such batches, got one array"
        )
    try:
        again = _grain(data[:1]) if _is_map_dataset(data) else iter(data)
    except TypeError:
        raise ValueError(
            f"{what} must be (x, labels) or an iterable of such batches, got a "
            f"{type(data).__name__}"
        ) from None
    first = next(again, None)
    if first is None:
        raise ValueError(f"{what} gave no batch")
    if again is data:
        raise ValueError(
            f"{what} is a generator, which can be read only once: pass something that can "
            "be iterated anew each epoch (a list of batches, a grain loader), or arrays"
        )
    if isinstance(data, list) and len(data) == 2 and is_array(first):
        raise ValueError(f"{what} is a list of two arrays: pass them as a tuple (x, labels)")
    return examples(_batch(what, 1), first, any_labels=any_labels)


def read_epoch(
    what: str, data: Any, epoch: int, *, skip: int = 0, most: int | None = None
) -> Generator[tuple[str, Batch]]:
    """Give an epoch's batches, with their names, as `parts` finds them: from ``skip`` on, ``most``.

    Another thread reads ahead and copies what it reads: a loader may write its next batch into the
    arrays of the last one.
    """
    empty = skip == 0
    numbers = itertools.count(skip + 1)
    with contextlib.closing(_in_background(what, _drawn(data, epoch, skip), skip, most)) as read:
        for number, batch in zip(numbers, read, strict=False):
            empty = False
            yield _batch(what, number), batch
    if empty:
        raise ValueError(f"{what} gave no batch in epoch {epoch + 1}: can it be iterated again?")


def _batch(what: str, number: int) -> str:
    return f"batch {number}" if what == "data" else f"{what}, batch {number}"


def _drawn(data: Any, epoch: int, skip: int) -> Iterator[Any]:
    """Iterate over what is left of an epoch."""
    if not _is_map_dataset(data):
        return itertools.islice(iter(data), skip, None)
    # The rows of another epoch are shuffled anew, and no batch is read to be passed over.
    batches = length(data)
    if batches is None:
        return _grain(data[skip:])
    return _grain(data.repeat()[epoch * batches + skip : (epoch + 1) * batches])


def _is_map_dataset(data: Any) -> bool:
    grain = sys.modules.get("grain")  # nobody has one of its data sets who has not imported it
    return grain is not None and isinstance(data, grain.MapDataset)


def _grain(data: Any) -> Iterator[Any]:
    # By default it reads 500 batches ahead.
    options = sys.modules["grain"].ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    return iter(data.to_iter_dataset(options))


def _in_background(
    what: str, batches: Iterator[Any], skip: int, most: int | None
) -> Generator[Batch]:
    """Read up to ``most`` batches in a thread, which ends with the iteration."""
    read: queue.Queue = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return read.put(item, timeout=0.1)

    def work() -> None:
        try:
            for number, batch in enumerate(itertools.islice(batches, most), skip + 1):
                own = jax.tree.map(_own, parts(_batch(what, number), batch))
                put((own, None))
                if stopped.is_set():
                    return
            put((None, None))
        except BaseException as error:  # raised where the batches are used
            put((None, error))

    thread = threading.Thread(target=work, name="kd2m_jax batches", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = read.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stopped.set()
        thread.join(timeout=5)  # a source that hangs is left to itself


def _own(array: Any) -> Any:
    """Return an array that nobody else writes into."""
    return (jnp.array if isinstance(array, jax.Array) else np.array)(array)  # both copy
