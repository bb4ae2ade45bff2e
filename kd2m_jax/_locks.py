"""Who may write where, and what a request to stop does."""

import contextlib
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


class CheckpointError(ValueError):
    """A checkpoint folder that is another process's or another run's, or cannot be written.

    `fit` raises it before the first step; nothing in the folder is changed.

    Example:
      >>> from kd2m_jax import CheckpointError
      >>> issubclass(CheckpointError, ValueError)
      True
    """


class Stopped(SystemExit):
    """SIGTERM came: the step was finished and saved. The same call, or --resume, continues.

    `fit` raises it where it has a checkpoint folder. A program that does not catch it ends with
    the status 143 that the shell expects after SIGTERM.

    Example:
      >>> from kd2m_jax import Stopped
      >>> Stopped(143).code, issubclass(Stopped, SystemExit)
      (143, True)
    """


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
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM has come, which meanwhile does not end the process."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals go to that one alone
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
