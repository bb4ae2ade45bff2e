"""Decoded arrays, kept beside the files that they were decoded from."""

import contextlib
import json
import logging
import os
import pathlib
import socket
from collections.abc import Callable

import numpy as np


def cached(folder: pathlib.Path, decode: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    """Return the arrays of a folder's files, from the cache beside it if that is still theirs.

    The cache is one uncompressed .npz file, ``.<folder's name>.arrays.npz`` in the folder above.
    It names the files by size and time of change, and its zip format has a checksum of each array.
    Where it is missing, damaged or of other files, ``decode`` is called and the cache written
    afresh. In a folder where nothing can be written the arrays are decoded each time.
    """
    return kept(folder.with_name(f".{folder.name}.arrays.npz"), lambda: _files(folder), decode)


def kept(
    cache: pathlib.Path, source: Callable[[], str], decode: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """Return the arrays of a cache file if they are of this source, else decode and keep them."""
    files = source()
    try:
        with np.load(cache) as found:
            if str(found["files"]) == files:
                return [found[f"array{i}"] for i in range(len(found) - 1)]
    except FileNotFoundError:
        pass
    except Exception as error:  # zip, NumPy and the file system have errors of many kinds
        logging.getLogger(__name__).warning(
            "%s cannot be used (%s): it is made again", cache, type(error).__name__
        )
    arrays = decode()
    try:  # what is meant to stay as it is does, for root too
        writable = cache.parent.stat().st_mode & 0o222
    except OSError:
        writable = False
    if writable and source() == files:  # nobody replaced them while they were being decoded
        _write(cache, {"files": np.array(files)} | {f"array{i}": a for i, a in enumerate(arrays)})
    return arrays


def _files(folder: pathlib.Path) -> str:
    stats = {path.name: path.stat() for path in sorted(folder.iterdir())}
    return json.dumps({name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()})


def _write(cache: pathlib.Path, content: dict[str, np.ndarray]) -> None:
    # Under a name of this process alone, then a rename: nobody reads half a file.
    scratch = cache.with_name(f"{cache.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        with scratch.open("wb") as out:
            np.savez(out, **content)  # pyright: ignore[reportArgumentType]
        scratch.replace(cache)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
