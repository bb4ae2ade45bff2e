"""The command line that every main shares: flags with defaults, and one line for a mistake."""

import ctypes
import itertools
import logging
import os
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import tyro

from kd2m_jax.internal import is_address, set_compiler_flags

from .errors import DataError, UsageError, command
from .files import read_object
from .mistakes import mistake

FlagsT = TypeVar("FlagsT", bound="Flags")


class Flags:
    """What the flags of every main inherit.

    Attributes:
      after_stop: what the shell is told once a run was stopped: how to go on with it.
    """

    after_stop: ClassVar[str] = "the same command starts again"

    def configured(self, content: dict[str, Any]) -> Self:
        """Return the flags with what a config.json has."""
        raise ValueError("this command takes none")


def optional(kind: str, default: str):
    """Describe a flag that may be left out, and the value that then stands in for it."""
    return tyro.conf.arg(metavar=kind, help_behavior_hint=f"(default: {default})")


def main(
    defaults: FlagsT, run: Callable[[FlagsT], object], *, module: str, description: str | None
) -> None:
    """Read the command line over these defaults and run; a mistake is one line and status 2."""
    arguments = [_expanded(argument) for argument in sys.argv[1:]]
    if "--version" in arguments:
        from kd2m_jax import __version__

        print(f"kd2m_jax {__version__}")
        return
    _refuse_addresses(arguments)
    if wrong := mistake(arguments, defaults):
        _fail(wrong)
        sys.exit(2)
    defaults = _with_config(defaults, arguments)
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"  # tyro looks at nothing else
    settings = _read(
        type(defaults),
        args=arguments,
        default=defaults,
        prog=command(module),
        description=_summary(description or ""),
    )
    prepare_jax()
    _quiet_threads()
    # Only now, because these load JAX, which --help does not need and the cache must precede.
    from kd2m_jax import CheckpointError, NonFiniteLoss, Stopped
    from kd2m_jax.internal import ProcessLost

    try:
        run(settings)
    except (UsageError, DataError, CheckpointError) as error:
        _fail(error)
        sys.exit(2)
    except Stopped as stopped:
        _fail(f"stopped and saved; {settings.after_stop}")
        sys.exit(stopped.code)
    except NonFiniteLoss as error:
        advice = "try a smaller --coef or --lr, or a --protocol with a smaller learning rate"
        _fail(f"{error}; {advice}")
        sys.exit(1)
    except ProcessLost as lost:
        _fail(f"{lost}; the same command with --resume continues")
        os._exit(1)  # the ordinary end waits for all processes
    except KeyboardInterrupt:
        _fail(f"stopped; {settings.after_stop}")
        sys.exit(130)
    except BrokenPipeError:  # the reader, say head, has seen enough
        _quiet_end()
    except OSError as error:
        if error.errno is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror}{where}; once that is mended {settings.after_stop}")
        sys.exit(1)


def _read(*given: Any, **options: Any) -> Any:
    """Read the command line; help into a closed pipe, say of head, is quiet."""
    try:
        return tyro.cli(*given, **options)
    except BrokenPipeError:
        _quiet_end()


def _quiet_end() -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _with_config(defaults: FlagsT, arguments: list[str]) -> FlagsT:
    """Take the defaults from a run's config.json where ``--config`` names one."""
    pairs = [argument.partition("=")[::2] for argument in arguments]
    pairs += itertools.pairwise(arguments)
    for file in [value for flag, value in pairs if flag == "--config" and value]:
        try:
            defaults = defaults.configured(read_object(pathlib.Path(file)))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            _fail(f"--config {file} cannot be used: {reason}")
            sys.exit(2)
    return defaults


def _quiet_threads() -> None:
    """Leave an error of orbax to whoever catches it: its threads print tracebacks as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def hook(unraisable) -> None:
        if threading.current_thread() is threading.main_thread():
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _refuse_addresses(arguments: list[str]) -> None:
    """End with one line where a folder is a bucket's address: locks and renames need a disk."""
    given = [a.partition("=")[::2] for a in arguments] + list(itertools.pairwise(arguments))
    given.append(("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR", "")))
    for flag, value in given:
        if flag.replace("_", "-") in ("--out", "--data-dir", "TFDS-DATA-DIR") and is_address(value):
            _fail(f"{flag} {value} is no local folder: name one, or mount the bucket")
            sys.exit(2)


def _summary(doc: str) -> str:
    """Return the first paragraph of a main's docstring, and its first command."""
    summary, _, rest = doc.partition("\n\n")
    first = rest.strip().splitlines()[0] if rest else ""
    return f"{summary}\n    {command(first.removeprefix('python -m '))}" if rest else summary


def _expanded(argument: str) -> str:
    """Put the user's home into ``--flag=~/x``, which a shell expands only after a blank."""
    flag, equals, value = argument.partition("=")
    return flag + equals + os.path.expanduser(value)


def prepare_jax() -> None:
    """Set what must stand before JAX is imported: how to compile, where to keep programs, memory.

    Programs are kept in the user's cache.
    """
    set_compiler_flags()
    keep_memory()
    # JAX decomposes matrices with OpenBLAS, whose threads wait for a core: beside other programs
    # gaussian_cw2 takes 2.2 ms with one and 19 to 101 with two (n = 128, d = 64). On two idle cores
    # 3.1 and 3.6, and at n = 512 84 and 83, in half the CPU time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # No traceback beside each operation: a twentieth of the CPU time of a digits run.
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    # Where there is no home a literal ~ is left: then no programs are kept.
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    if not cache.startswith("~"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "kd2m_jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


# glibc's mallopt: its parameters' numbers in malloc.h, and our values.
_MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}


def keep_memory() -> None:
    """Have glibc keep the memory of a step for the next one; elsewhere nothing happens.

    Otherwise it gives large arrays back, and Linux makes each of their pages anew: 37,000 page
    faults a step of resnet20 to resnet8 at batch 128, 2,000 so, in 0.85 of the CPU time (one core,
    488 ms to 418). The peak of memory was 0.95 to 1.15 of what it is otherwise.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc
        return
    for parameter, value in _MALLOPT.values():
        mallopt(parameter, value)


def _fail(message: object) -> None:
    print(f"error: {message}", file=sys.stderr)
