"""TensorBoard's events, by tensorboardX."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

if "torch" in sys.modules:
    from tensorboardX import SummaryWriter
else:
    # tensorboardX imports torch where it is installed: 2 CPU seconds, and scalars need none of it.
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        del sys.modules["torch"]


@contextlib.contextmanager
def event_writer(folder: pathlib.Path) -> Iterator[SummaryWriter]:
    """Open an event file in a folder; its thread and its file end with the context."""
    writer = SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()
