"""The progress bar of one training, and how fast it was."""

import contextlib
import time
from collections.abc import Iterator

from tqdm import tqdm

from experiments.runs.build import Plan
from kd2m_jax.internal import is_first


class Progress:
    """A callback of `kd2m_jax.fit` that moves a bar.

    What an interrupted run had done counts as done, not as speed.
    """

    def __init__(self, bar: tqdm, batch_size: int):
        self._bar, self._batch_size = bar, batch_size
        self._scores, self._marks = {}, []

    def __call__(self, record: dict) -> None:
        """Show a record."""
        bar, images = self._bar, record["step"] * self._batch_size
        self._scores["loss"] = f"{record['loss']:.3f}"
        if "test_accuracy" in record:
            self._scores["test"] = f"{100 * record['test_accuracy']:.1f}%"
        bar.set_postfix(self._scores, refresh=False)
        if record.get("replayed"):
            bar.initial = bar.n = images
            return
        bar.update(images - bar.n)
        self._marks.append((time.perf_counter(), images))

    def images_per_second(self) -> float | None:
        """Return the speed from the first record to the last.

        Evaluations are included. Compilation comes before the first record, so it is not.
        """
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start)


@contextlib.contextmanager
def shown(title: str, plan: Plan) -> Iterator[Progress]:
    """Show a bar while a plan's steps are trained; only the first process does."""
    with tqdm(
        desc=title,
        total=plan.steps * plan.config.batch_size,
        unit=" images",
        unit_scale=True,
        leave=None,  # under a table's bar this one goes when it is done
        disable=not is_first(),
    ) as bar:
        yield Progress(bar, plan.config.batch_size)
