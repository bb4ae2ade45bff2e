"""Somebody's iterable of batches: read epoch by epoch, in the background."""

import contextlib
import itertools
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd2m_jax.training._body import Batch
from kd2m_jax.training._examples import are_rows, examples, is_array, parts

_AHEAD = 2  # batches that wait on the host, at most
_THREADS = 8  # of grain, each with a batch in hand
_ONCE = (
    "is a generator, which can be read only once: pass something that can be iterated anew each "
    "epoch (a list of batches, a grain loader), or arrays"
)
_FILTERED = ": a filter behind batch() leaves whole batches out, put it before"


def are_arrays(data: Any) -> bool:
    """Tell arrays from an iterable of batches: a pair or a dict with an array in it."""
    if isinstance(data, Mapping):
        return True
    given = data if isinstance(data, tuple) and len(data) in (2, 3) else ()
    return any(part is None or is_array(part) or are_rows(part) for part in given)


def length(data: Any) -> int | None:
    """Return how many batches an epoch has; None where it does not say, or never ends."""
    try:
        batches = len(data)
    except TypeError:
        return None
    return None if batches == sys.maxsize else batches


def first_batch(what: str, data: Any, *, any_labels: bool = False) -> tuple[Batch, Any]:
    """Return the first batch, and the iterator that gave it, held weakly where that can be.

    ValueError where there is no batch, or it is none.
    """
    if is_array(data):
        raise ValueError(
            f"{what} must be (x, labels) or an iterable of such batches, got one array"
        )
    _tell_epoch(data, 0)
    try:
        again = _grain(data[:1]) if is_map_dataset(data) else iter(data)
    except TypeError:
        raise ValueError(
            f"{what} must be (x, labels) or an iterable of such batches, got a "
            f"{type(data).__name__}"
        ) from None
    first = next(again, None)
    if again is data:
        raise ValueError(f"{what} {_ONCE}")
    if first is None:
        raise ValueError(f"{what} gave no batch{_FILTERED if is_map_dataset(data) else ''}")
    if isinstance(data, list) and len(data) == 2 and is_array(first):
        raise ValueError(f"{what} is a list of two arrays: pass them as a tuple (x, labels)")
    try:
        source = weakref.ref(again)  # it may hold processes
    except TypeError:
        source = lambda: again  # noqa: E731
    return examples(_batch(what, 1), first, any_labels=any_labels), source


def read_epoch(
    what: str,
    data: Any,
    epoch: int | None = None,
    *,
    skip: int = 0,
    most: int | None = None,
    waiting: Callable[[], None] = lambda: None,
    first: Callable[[], Any] | None = None,
) -> Generator[tuple[str, Batch]]:
    """Give an epoch's batches, with their names, as `parts` finds them: from ``skip`` on, ``most``.

    Another thread reads ahead and copies what it reads: a loader may write its next batch into the
    arrays of the last one. ``first`` is the iterator that `first_batch` read from, which must be
    another.
    """
    empty = skip == 0
    numbers = itertools.count(skip + 1)
    drawn = _drawn(what, data, epoch or 0, skip, first)
    with contextlib.closing(_in_background(what, drawn, skip, most, waiting)) as read:
        for number, batch in zip(numbers, read, strict=False):
            empty = False
            yield _batch(what, number), batch
    if empty:
        when = "" if epoch is None else f" in epoch {epoch + 1}"
        raise ValueError(f"{what} gave no batch{when}: can it be iterated again?")


def _batch(what: str, number: int) -> str:
    return f"batch {number}" if what == "data" else f"{what}, batch {number}"


def _drawn(what: str, data: Any, epoch: int, skip: int, first) -> Iterator[Any]:
    """Iterate over what is left of an epoch."""
    if not is_map_dataset(data):
        _tell_epoch(data, epoch)
        batches = iter(data)
        if first is not None and first() is batches:
            raise ValueError(f"{what} {_ONCE}")
        return itertools.islice(batches, skip, None)
    # The rows of another epoch are shuffled anew, and no batch is read to be passed over.
    batches = length(data)
    if batches is None:
        return _grain(data[skip:])
    return _grain(data.repeat()[epoch * batches + skip : (epoch + 1) * batches])


def _tell_epoch(data: Any, epoch: int) -> None:
    """Call ``set_epoch`` where there is one: so samplers of torch and data sets shuffle anew."""
    getattr(data, "set_epoch", lambda epoch: None)(epoch)


def is_map_dataset(data: Any) -> bool:
    grain = sys.modules.get("grain")  # nobody has one of its data sets who has not imported it
    return grain is not None and isinstance(data, grain.MapDataset)


def _grain(data: Any) -> Iterator[Any]:
    # By default it reads 500 batches ahead.
    options = sys.modules["grain"].ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    return iter(data.to_iter_dataset(options, allow_nones=True))


def _in_background(
    what: str, batches: Iterator[Any], skip: int, most: int | None, waiting: Callable[[], None]
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
                if batch is None:  # grain's, for one that a filter has left out
                    raise ValueError(f"{_batch(what, number)} is none{_FILTERED}")
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
            try:
                batch, error = read.get(timeout=0.5)
            except queue.Empty:
                waiting()
                continue
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
    return jnp.array(array) if isinstance(array, jax.Array) else array.copy()
