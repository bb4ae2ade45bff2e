"""The students of one program: one, or a population."""

import dataclasses
import functools
import logging
from typing import TypeAlias

from kd2m_jax.adapters import Model
from kd2m_jax.losses import Metric, MetricSum
from kd2m_jax.training._body import Coef

AnyMetric: TypeAlias = Metric | MetricSum | str | None


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
