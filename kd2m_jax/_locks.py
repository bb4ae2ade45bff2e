"""Who may write where, and what a request to stop does."""

import contextlib
import os
import pathlib
import re
import signal
import threading
from collections.abc import Callable, Iterator

from kd2m_jax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def is_address(folder: str | os.PathLike) -> bool:
    """Return whether this is an address such as gs://bucket, of which pathlib makes gs:/bucket."""
    return re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(folder)) is not None  # two letters: no C:/


def check_local(folder: str | os.PathLike | None) -> None:
    """Raise CheckpointError for an address of a bucket: its lock and renames need a local disk."""
    if folder is not None and is_address(folder):
        raise CheckpointError(
            f"{os.fspath(folder)} is no local folder: write to one and copy it, or mount the bucket"
        )


@contextlib.contextmanager
def locked(file: pathlib.Path, *, waiting: Callable[[str], object] | None = None) -> Iterator[None]:
    """Hold a folder by a file in it; the lock ends with the process, however it ends.

    While another process holds it: CheckpointError, or, with ``waiting``, that is called with a
    sentence and the other is waited for. CheckpointError too if the folder cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+")
    except OSError as error:
        raise CheckpointError(
            f"{file.parent} cannot be written ({error.strerror or error}): use another folder"
        ) from error
    with handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                sentence = (
                    f"{file.parent} is in use by another process ({handle.read() or 'unknown'})"
                )
                if waiting is None:
                    raise CheckpointError(
                        f"{sentence}: wait for it, or use another folder"
                    ) from None
                waiting(f"{sentence}: waiting for it.")
                fcntl.flock(handle, fcntl.LOCK_EX)
        handle.truncate(0)
        handle.write(f"pid {os.getpid()}")
        handle.flush()
        yield


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the number of the signal that asked to stop, or None.

    SIGTERM and Ctrl-C (SIGINT) meanwhile do not end the process. A second Ctrl-C raises
    KeyboardInterrupt wherever the process is.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals go to that one alone
        yield lambda: None
        return

    def remember(number: int, frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
