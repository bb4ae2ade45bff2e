"""How far a call of `fit` is, as a bar."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from kd2m_jax.training._plan import Plan
from kd2m_jax.training._processes import is_first
from kd2m_jax.training._records import Record


def wanted(progress: bool | None) -> bool:
    """Return whether to show a bar: if asked, or by default in a terminal or a notebook."""
    return sys.stderr.isatty() or _in_notebook() if progress is None else progress


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextlib.contextmanager
def shown(plan: Plan, progress: bool | None) -> Iterator[None]:
    """Show a bar while a plan runs; of several processes in the first alone."""
    if not (wanted(progress) and is_first()):
        yield
        return
    bar = Progress("fit", steps=plan.total, batch_size=plan.batches.sample.labels.shape[0])
    plan.records[0].callbacks.append(bar)  # a population's first student stands for all
    try:
        yield
    finally:
        bar.close()


class Progress:
    """A bar that records move: examples per second, losses, test accuracy, time left.

    What an interrupted run had done counts as done, not as speed.
    """

    def __init__(self, title: str, *, steps: int | None, batch_size: int, **options: Any):
        from tqdm.std import tqdm

        if _in_notebook():
            from tqdm.auto import tqdm

        total = None if steps is None else steps * batch_size
        options = {"unit": " examples", "unit_scale": True} | options
        self._bar = tqdm(desc=title, total=total, **options)
        self._batch_size = batch_size
        self._scores: dict[str, str] = {}
        self._marks: list[tuple[float, float]] = []

    def __call__(self, record: Record) -> None:
        """Move the bar: a callback of `fit`."""
        bar, examples = self._bar, record["step"] * self._batch_size
        self._scores["loss"] = f"{record['loss']:.3f}"
        if "distillation_loss" in record:
            self._scores["distance"] = f"{record['distillation_loss']:.3g}"
        if "test_accuracy" in record:
            self._scores["test"] = f"{100 * record['test_accuracy']:.1f}%"
        bar.set_postfix(self._scores, refresh=False)
        if record.get("replayed"):
            bar.initial = bar.n = examples
            return
        bar.update(examples - bar.n)
        self._marks.append((time.perf_counter(), examples))

    def per_second(self) -> float | None:
        """Return the speed from the first record to the last.

        Evaluations are included. Compilation comes before the first record, so it is not.
        """
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
