"""Training metrics on their way from the device to the callbacks."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from kd2m_jax.errors import NonFiniteLoss

# Numbers, and None for a total that is not known.
Record: TypeAlias = dict[str, Any]


class Records:
    """Means over the steps since the last record, checked for NaN, one list per student.

    ``student`` is the student's number in a population, or None.
    """

    def __init__(
        self,
        callbacks: Sequence[Callable[[Record], object]],
        *,
        has_teacher: bool,
        total: int | None,
        student: int | None = None,
        own_task: bool = False,
    ):
        self.history: list[Record] = []
        self.callbacks = list(callbacks)
        self._total, self._student = total, student
        self.best_by = "test_loss" if own_task else "test_accuracy"
        names = {"loss": "loss", "task_loss": "task_loss", "accuracy": "train_accuracy"}
        if has_teacher:
            names |= {"distillation_loss": "distillation_loss", "coef": "coef"}
        self._names = names
        self._window: list[dict[str, Any]] = []
        self._at = (0, 0)
        # A call's metrics, still on the device, and the step and epoch it ended with.
        self._pending: tuple[dict[str, jax.Array], tuple[int, int]] | None = None

    def __len__(self) -> int:
        """Return how many steps have been read since the last record."""
        return len(self._window)

    @property
    def whose(self) -> str:
        """The end of "the loss...": empty, or which student's."""
        return "" if self._student is None else f" of student {self._student}"

    def quality(self, scores: Record) -> float:
        """Return what decides which epoch is the best: the accuracy, or minus the task's loss."""
        score = scores[self.best_by]
        return -score if self.best_by == "test_loss" else score

    @property
    def tests(self) -> list[float]:
        """The `quality` of each evaluation so far."""
        return [self.quality(r) for r in self.history if "test_loss" in r]

    def add(self, step: int, epoch: int, metrics: dict[str, jax.Array]) -> None:
        """Take a call's metrics. They are read one call later, while the next one runs."""
        try:
            self.settle()
        finally:
            self._pending = (metrics, (step, epoch))

    def settle(self) -> None:
        """Read the metrics still in flight; NonFiniteLoss if one's loss is not finite."""
        if self._pending is None:
            return
        (metrics, at), self._pending = self._pending, None
        # A sum of metrics reports its terms beside it.
        names = [name for name in self._names if name in metrics]
        names += [name for name in metrics if name.startswith("distillation_loss/")]
        columns = {name: np.asarray(metrics[name], np.float64) for name in names}
        if self._window and self._window[0].keys() != columns.keys():
            # The steps before a resumption, which may have spelled the terms in another way.
            self._window = [dict(zip(names, old.values(), strict=True)) for old in self._window]
        losses = columns["loss"]
        for i in range(len(losses)):
            values: dict[str, Any] = {name: float(column[i]) for name, column in columns.items()}
            if not math.isfinite(values["loss"]):
                self._refuse(values, at[0] - len(losses) + 1 + i)
            if math.isnan(values.get("accuracy", 0)):  # none of the batch's rows has a label
                values["accuracy"] = None
            self._window.append(values)
        self._at = at

    def _refuse(self, values: dict[str, float], step: int) -> None:
        terms = ", ".join(f"{name} {value}" for name, value in values.items())
        # Before anything was learnt: cross-entropy is NaN for a label beyond the logits.
        hint = ": inputs not finite, or labels not below the number of classes?"
        raise NonFiniteLoss(
            f"the loss{self.whose} is not finite at step {step} ({terms})"
            + (hint if step == 1 else "")
        )

    def close(self, scores: Record | None = None) -> None:
        """Make a record of the steps that have been read; `deliver` hands it over."""
        if not self._window:
            return
        step, epoch = self._at
        record = {"step": step, "epoch": epoch, "steps": self._total}
        for name in self._window[0]:
            alias = self._names.get(name, name)
            known = [values[name] for values in self._window if values[name] is not None]
            if known:
                record[alias] = sum(known) / len(known)
        self._window = []
        self.history.append(record | (scores or {}))

    def deliver(self, first: int, *, replayed: bool = False) -> bool:
        """Hand the callbacks a copy of each record from the given number on: did any say "stop"?"""
        marks, stop = {"replayed": True} if replayed else {}, False
        if self._student is not None:
            marks |= {"student": self._student}
        for record in self.history[first:]:
            for callback in self.callbacks:
                said = callback(record | marks)
                stop = stop or (isinstance(said, str) and said == "stop")
        return stop

    def state(self) -> dict:
        """Return what `replay` takes: all records, and the steps since the last one."""
        self.settle()
        return {"history": self.history, "window": self._window, "at": self._at}

    def replay(self, state: dict) -> bool:
        """Hand over the records of an earlier run again, marked as such: did any say "stop"?"""
        self.history, self._window = list(state["history"]), list(state["window"])
        self._at = tuple(state["at"])
        return self.deliver(0, replayed=True)
