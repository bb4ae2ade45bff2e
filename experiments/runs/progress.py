"""The progress bar of one training."""

import contextlib
from collections.abc import Iterator

from kd2m_jax.internal import Progress, is_first

from .build import Plan


@contextlib.contextmanager
def shown(title: str, plan: Plan) -> Iterator[Progress]:
    """Show a bar while a plan's steps are trained; only the first process does."""
    bar = Progress(
        title,
        steps=plan.steps,
        batch_size=plan.config.batch_size,
        unit=" images",
        leave=None,  # under a table's bar this one goes when it is done
        disable=not is_first(),
    )
    with contextlib.closing(bar):
        yield bar
