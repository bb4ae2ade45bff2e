"""The students of one program: one, or a population."""

import dataclasses
import functools
import inspect
import logging
from typing import Any, TypeAlias

import jax
import numpy as np

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Model
from kd2m_jax.losses import METRICS, ClassStatistics, Metric, MetricSum
from kd2m_jax.losses._resolve import AnyMetric as AnyMetric
from kd2m_jax.losses._resolve import resolve
from kd2m_jax.teachers import Bank, EmaTeacher
from kd2m_jax.training._body import Coef, TaskLoss
from kd2m_jax.training._labels import needs_labels

# Whom a student is compared with.
Teacher: TypeAlias = Model | Outputs | EmaTeacher | Bank | ClassStatistics | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Students:
    """The students of one program: lists of one length.

    Attributes:
      models: what the caller trains.
      metrics: what each compares with the teacher.
      coefs: the weight of that.
      is_population: whether the caller gave a list.
    """

    models: list[Model]
    metrics: list[AnyMetric]
    coefs: list[Coef | str]
    is_population: bool

    @classmethod
    def of(cls, student, metric, coef) -> "Students":
        """Repeat single values for every student; ValueError where lists do not fit."""
        several = (list, tuple)  # exactly: a Network is a NamedTuple
        lengths = {len(g) for g in (student, metric, coef) if type(g) in several}
        if type(metric) in several and type(coef) in several and type(student) not in several:
            _say_what_lists_mean()
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError("lists of students, metrics and coefs differ in length or are empty")
        (count,) = lengths or {1}
        models, metrics, coefs = (
            list(g) if type(g) in several else [g] * count for g in (student, metric, coef)
        )
        return cls(models=models, metrics=metrics, coefs=coefs, is_population=bool(lengths))

    def check_teacher(self, has_teacher: bool) -> None:
        """Raise ValueError where there is a metric without a teacher, or the reverse."""
        without = {metric is None or metric == "none" for metric in self.metrics}
        if len(without) > 1:
            raise ValueError(
                "metric none among others: the students of a population all have the teacher, or "
                "none has; coef 0 leaves a metric without effect"
            )
        if without == {has_teacher}:
            missing = "metric" if has_teacher else "teacher"
            raise ValueError(
                f"a teacher and a metric to compare with it come together, and {missing} is missing"
            )

    def without_labels(self) -> "Students":
        """Return them with a weight of 1 for "auto", which follows the cross-entropy."""
        if not any(isinstance(c, str) for c in self.coefs):
            return self
        logging.getLogger(__name__).warning(
            "no example has a label, so there is no cross-entropy for coef='auto' to follow: it is "
            "1"
        )
        return dataclasses.replace(
            self, coefs=[1.0 if isinstance(c, str) else c for c in self.coefs]
        )


@functools.cache  # once
def _say_what_lists_mean() -> None:
    logging.getLogger(__name__).warning(
        "a list of metrics and a list of coefs train one student for each pair, as a population; "
        "one student on the weighted sum of the metrics: losses.metric_sum(metrics, weights)"
    )


def check_memory_suits(metrics: list[AnyMetric], teacher: Bank | ClassStatistics) -> None:
    """Raise ValueError for a metric that cannot use what is left of a teacher."""
    for metric in map(resolve, metrics):
        for term in metric.metrics if isinstance(metric, MetricSum) else [metric]:
            if isinstance(term, Metric):
                _check_term(term, teacher)
            elif term is not None and "labels_t" not in inspect.signature(term).parameters:
                raise ValueError(
                    "a metric of your own compares with a bank or with statistics if it takes "
                    "labels_t, the classes of the teacher's rows, beside key"
                )


def _check_term(term: Metric, teacher: Bank | ClassStatistics) -> None:
    if METRICS[term.name].paired:
        others = ", ".join(name for name, info in METRICS.items() if not info.paired)
        raise ValueError(
            f"metric {term.label!r} compares each example with itself, and this teacher has not "
            f"seen the student's examples: these need no pairs: {others}"
        )
    if isinstance(teacher, ClassStatistics) and "logits" in term.needs:
        raise ValueError(f"metric {term.label!r} needs logits, which class statistics do not have")
    if isinstance(teacher, Bank) and teacher.labels is None and "labels" in term.needs:
        raise ValueError(f"metric {term.label!r} needs the bank's labels: Bank(..., labels=...)")
    if isinstance(teacher, Bank) and teacher.outputs.logits is None and "logits" in term.needs:
        raise ValueError(f"metric {term.label!r} needs the bank's logits: Bank(..., logits=...)")


def check_labels(
    metrics: list[AnyMetric],
    teacher: Bank | ClassStatistics | None,
    rule,
    classes: int | None,
    *,
    has_transfer: bool,
) -> None:
    """Raise ValueError where a conditional metric would find no class to compare."""
    if isinstance(rule, tuple) and classes is not None and len(rule[1]) != classes:
        raise ValueError(f"'balanced' has {len(rule[1])} shares, and there are {classes} classes")
    if not any(needs_labels(metric) for metric in map(resolve, metrics)):
        return
    if has_transfer and rule == "drop":
        raise ValueError(
            "unlabelled='drop' leaves the whole transfer set out of a conditional metric, because "
            "none of it has a label"
        )
    if classes is None:
        return
    if isinstance(teacher, Bank) and teacher.labels is not None:
        known = np.asarray(teacher.labels)
        if known.min() < -1 or known.max() >= classes or known.max() < 0:
            raise ValueError(
                f"the bank's labels must be class numbers from 0 to {classes - 1}, or -1 for none, "
                f"got {known.min()} to {known.max()}"
            )
    if isinstance(teacher, ClassStatistics) and not (teacher.shares[:classes] > 0).any():
        raise ValueError(f"the statistics are of no class from 0 to {classes - 1}")


def check_rows_meet(task_loss: TaskLoss, out: Any, labels: Any) -> None:
    """Raise ValueError where logits [n, 1] and labels [n] would make [n, n] of each other."""
    if labels.ndim != 1 or out.logits is None or out.logits.shape[1:] != (1,):
        return
    with jax.numpy_rank_promotion("raise"):
        try:
            jax.eval_shape(task_loss, out, labels)
        except ValueError as error:
            if "rank_promotion" in str(error):
                raise ValueError(
                    "task_loss sets logits [n, 1] against labels [n], which gives [n, n]: take "
                    "out.logits[:, 0], or labels[:, None] as data"
                ) from error
            raise
