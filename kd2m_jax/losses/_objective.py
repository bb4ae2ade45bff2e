"""The student's loss: cross-entropy on the labels plus lambda times a distance."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from kd2m_jax._outputs import Outputs
from kd2m_jax.losses._checks import (
    are_distributions,
    class_labels,
    floating,
    integer_labels,
    matrix,
    row_mean,
    several_classes,
)
from kd2m_jax.losses._metrics import MetricSum, as_outputs
from kd2m_jax.losses._resolve import AnyMetric, compared, resolve
from kd2m_jax.losses._statistics import ClassStatistics


class LossTerms(NamedTuple):
    """The parts of a distillation loss, all scalars: unweighted, so that runs compare.

    Attributes:
      task: the cross-entropy on the labels, in nats.
      distillation: the metric's value, in its own unit; of a sum of metrics, their sum with its
        weights.
      parts: of a sum of metrics, each one's own value as it is written; else empty.

    Example:
      >>> import jax.numpy as jnp
      >>> one, other = Outputs(jnp.zeros((3, 2))), Outputs(jnp.ones((3, 2)))
      >>> one = one._replace(logits=jnp.zeros((3, 4)))
      >>> labels = jnp.array([0, 1, 1])
      >>> _, terms = distillation_loss(one, other, labels, metric="l2+mmd-linear", coef=0.1)
      >>> parts = {name: float(value) for name, value in terms.parts.items()}
      >>> print(terms.distillation, parts)
      4.0 {'l2': 2.0, 'mmd-linear': 2.0}
    """

    task: jax.Array
    distillation: jax.Array
    parts: dict[str, jax.Array]


def distillation_loss(
    student: Outputs,
    teacher: Outputs | ClassStatistics,
    labels: ArrayLike,
    *,
    metric: AnyMetric,
    coef: jax.Array | float,
    task_coef: jax.Array | float = 1.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, LossTerms]:
    """Compute the student's loss: ``task_coef * cross-entropy + coef * metric(student, teacher)``.

    Args:
      student: `Outputs` for the batch; its logits ``[n, k]`` are needed.
      teacher: `Outputs` for the same batch, or `ClassStatistics`. No gradient flows to it.
      labels: ``[n]`` integers in [0, k). A row of -1 has no label: the cross-entropy is the mean
        over the others (0 without any), and a conditional metric leaves it out. Other numbers
        make the loss NaN. Or ``[n, k]`` floating, each row a distribution over the classes; a
        conditional metric then takes the most probable one.
      metric: a name, a `Metric`, a `MetricSum`, one of the losses, a function
        ``(student, teacher, labels) -> scalar`` of your own, or None (or "none") for the
        cross-entropy alone.
      coef: >= 0, the weight lambda of the distance; may be traced.
      task_coef: >= 0, the weight of the cross-entropy; may be traced.
      key: a PRNG key, for metrics that draw.

    Returns:
      ``(loss, LossTerms(task, distillation, parts))``, float32 scalars. The loss is in nats plus
      lambda times the metric's unit (squared distance or nats).

    Raises:
      ValueError: a negative weight, a single class (unless task_coef is 0), or a metric that needs
        what it was not given.
      TypeError: labels that are not integers, a metric that is none.

    Example:
      >>> import jax.numpy as jnp
      >>> out = Outputs(jnp.eye(3), jnp.zeros((3, 2)))
      >>> labels = jnp.array([0, 1, 1])
      >>> loss, terms = distillation_loss(out, out, labels, metric="l2", coef=1.0)
      >>> print(f"{loss:.4f} {terms.task:.4f} {terms.distillation:.4f}")
      0.6931 0.6931 0.0000

    References:
      Fernandes Montesuma, KD2M, GSI 2025, Algorithm 1.
    """
    student = as_outputs("student", student)
    if not isinstance(teacher, ClassStatistics):
        teacher = as_outputs("teacher", teacher)
    for name, weight in (("coef", coef), ("task_coef", task_coef)):
        if not isinstance(weight, jax.core.Tracer) and not float(weight) >= 0:
            raise ValueError(f"{name} must be >= 0, got {weight}")
    task = cross_entropy(student_logits(student, task_coef), labels)
    distillation, parts = distance(student, teacher, classes_of(labels), metric, key=key)
    total = jnp.asarray(task_coef) * task + jnp.asarray(coef) * distillation
    return total, LossTerms(task, distillation, parts)


def student_logits(student: Outputs, task_coef: jax.Array | float) -> jax.Array:
    """Return the logits ``[n, k]`` for the cross-entropy; ValueError where it cannot use them."""
    if student.logits is None:
        raise ValueError("the student's Outputs have no logits, which the cross-entropy needs")
    logits = matrix("the student's logits", student.logits)
    if isinstance(task_coef, jax.core.Tracer) or task_coef != 0:
        several_classes("the cross-entropy", logits.shape[1])
    return logits


def distance(
    student: Outputs,
    teacher: Outputs | ClassStatistics,
    labels: ArrayLike | None,
    metric: AnyMetric,
    *,
    key: jax.Array | None = None,
    **apart: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return a metric's value, 0 for none, and of a sum of metrics its parts.

    ``apart`` is ``labels_t``, where the teacher's rows are of other examples.
    """
    found = resolve(metric)
    teacher = jax.lax.stop_gradient(teacher)
    if found is None:
        return jnp.zeros((), jnp.float32), {}
    if isinstance(found, MetricSum):
        parts = found.parts(student, teacher, labels, key=key, **apart)
        return found.weigh(parts), parts
    return compared(found, student, teacher, labels, key=key, **apart), {}


def classes_of(labels: ArrayLike) -> jax.Array:
    """Return class numbers ``[n]``: of distributions over the classes the most probable ones.

    A row of zeros is none: what one-hot coding makes of -1.
    """
    if are_distributions(labels):
        labels = jnp.asarray(labels)
        return jnp.where(jnp.sum(labels, axis=1) > 0, jnp.argmax(labels, axis=1), -1)
    return integer_labels(labels)


def cross_entropy(logits: jax.Array, labels: ArrayLike, *, all_labelled: bool = False) -> jax.Array:
    """Return the mean over the rows that have a label, in nats; 0 without any.

    NaN for a label that is no class, which indexing would take for another one. Where it is known
    that all rows have labels the program is a simpler one.
    """
    n, k = logits.shape
    if are_distributions(labels):
        labels = floating("labels", labels)
        if labels.shape != (n, k):
            raise ValueError(
                f"labels that are distributions must have shape {[n, k]}, got {list(labels.shape)}"
            )
        labels = labels.astype(logits.dtype)
        total = jnp.sum(optax.losses.softmax_cross_entropy(logits, labels))
        mass = jnp.sum(labels)  # the number of rows, less those of zeros
        return total / jnp.where(mass > 0, mass, 1)
    labels = class_labels(labels, n)
    known = (labels >= 0) & (labels < k)
    nats = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(known, labels, 0)
    )
    if all_labelled:
        return jnp.mean(nats * jnp.where(known, 1, jnp.nan))
    has_label = labels != -1
    return row_mean(nats * jnp.where(known | ~has_label, 1, jnp.nan), has_label)
