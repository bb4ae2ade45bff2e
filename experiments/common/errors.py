"""The errors that the shell shows as one line, without a traceback."""

import contextlib
import os
from collections.abc import Iterator

# Where the experiments are: "experiments" in a clone, "kd2m_jax.experiments" of a wheel.
ROOT = __name__.removesuffix(".common.errors")
# Whether a user types "kd2m digits": set by that command, which also runs those of a clone.
BY_NAME = ROOT != "experiments"


def command(main: str) -> str:
    """Return what a user types for a main, "experiments.digits", and what follows it."""
    return f"kd2m {main.partition('.')[2]}" if BY_NAME else f"python -m {main}"


class UsageError(ValueError):
    """A mistake of the user, shown as one line with exit status 2."""


class DataError(RuntimeError):
    """A data set that is missing or damaged; the message says what to do."""


@contextlib.contextmanager
def reading(path: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Turn any failure inside into a `DataError` that names the file."""
    try:
        yield
    except (DataError, ImportError, MemoryError):  # not the file's fault
        raise
    except Exception as error:
        # Some messages hold a whole example: the beginning, on one line, says what is wrong.
        reason = " ".join(f"{type(error).__name__}: {error}"[:300].split())
        raise DataError(f"{path} cannot be used: {reason}\n{remedy}") from error
