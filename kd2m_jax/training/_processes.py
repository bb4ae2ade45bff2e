"""What the processes of one run do together: start, act as one, notice that one is lost."""

import contextlib
import itertools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_LONGEST_WAIT_S = 24 * 3600  # for a folder that another run holds; a dead process is noticed before
_DEAD_AFTER_S = 30  # without a heartbeat
# Every process counts alike: all make the same calls in one order. JAX answers yes to one number
# alone, the one after the last that any process had asked with, so questions count for themselves.
_meetings, _questions = itertools.count(), itertools.count(1)


class ProcessLost(RuntimeError):
    """Raised where a process cannot go on, most likely because another one has ended."""


def start(coordinator: str | None, processes: int | None, number: int | None) -> None:
    """Meet the other processes; ValueError where nothing was given and nothing is detected."""
    jax.distributed.initialize(
        coordinator,
        processes,
        number,
        heartbeat_timeout_seconds=_DEAD_AFTER_S,
        shutdown_timeout_seconds=_DEAD_AFTER_S,
    )


@contextlib.contextmanager
def watched():
    """ProcessLost for the error that a collective raises when another process is gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        first_line = str(error).split("\n", 1)[0]
        raise ProcessLost(f"this run of several processes broke off: {first_line:.300}") from error


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def by_first(function: Callable[[], T]) -> T:
    """Call in process 0 alone; its result, or what it raised, in all of them."""
    if jax.process_count() == 1:
        return function()
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_first():
        try:
            outcome = (function(), None)
        except Exception as error:
            outcome = (None, error)
    result, error = pickle.loads(_broadcast(pickle.dumps(outcome)))
    if error is not None:
        raise error
    return result


def after_first(function: Callable[[], T]) -> T:
    """Call in process 0, then in the others, which find on disk what it made there."""
    made: list[T] = []
    by_first(lambda: made.append(function()))
    return made[0] if made else function()


def gathered(text: str) -> list[str]:
    """Every process's text, in every process."""
    if jax.process_count() == 1:
        return [text]
    _meet()
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = multihost_utils.process_allgather(np.pad(data, (0, max(sizes) - len(data))))
    return [row[:size].tobytes().decode() for row, size in zip(padded, sizes, strict=True)]


@contextlib.contextmanager
def held_by_first(context: contextlib.AbstractContextManager[T]):
    """Enter and leave a context in process 0 alone; its (picklable) value in all of them."""
    with contextlib.ExitStack() as stack:
        yield by_first(lambda: stack.enter_context(context))


def _broadcast(data: bytes) -> bytes:
    """Process 0's bytes."""
    _meet()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    mine = np.frombuffer(data, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return multihost_utils.broadcast_one_to_all(mine).tobytes()


def _meet() -> None:
    """Wait for the others without a collective: on the CPU those give up after 30 seconds."""
    from orbax.checkpoint import multihost  # takes a second to import

    multihost.sync_global_processes(
        f"kd2m_jax-{next(_meetings)}",
        timeout=_LONGEST_WAIT_S,
        processes=set(range(jax.process_count())),
    )


def asked_to_stop() -> bool:
    """Whether SIGTERM has come to any process: true in all of them at the same call."""
    return multihost_utils.reached_preemption_sync_point(next(_questions))


def summed(sums: dict[str, float]) -> dict[str, float]:
    """Add the sums of all processes up."""
    if jax.process_count() == 1:
        return sums
    parts = multihost_utils.process_allgather(sums)
    return {name: float(np.sum(part)) for name, part in parts.items()}


def agreed(said: bool) -> bool:
    """Whether any process says so."""
    return bool(summed({"said": float(said)})["said"])


def every_row(tree: Any) -> Any:
    """Put the rows of all processes' arrays one after another."""
    if jax.process_count() == 1:
        return tree
    count = len(jax.tree.leaves(tree)[0])
    counts = multihost_utils.process_allgather(np.int32(count))
    missing = int(max(counts)) - count
    filled = jax.tree.map(lambda a: np.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)]), tree)
    parts = multihost_utils.process_allgather(filled)
    return jax.tree.map(
        lambda a: np.concatenate([part[:n] for part, n in zip(a, counts, strict=True)]), parts
    )
