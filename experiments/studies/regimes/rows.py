"""The rows of the tables: which distance, against which teacher, and the controls."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kd2m_jax import Outputs


def teacher_classes(student: Outputs, teacher: Outputs, labels: jax.Array) -> jax.Array:
    """Compute the cross-entropy on the classes that the teacher predicts, in nats."""
    del labels
    nats = optax.losses.softmax_cross_entropy_with_integer_labels
    classes = jnp.argmax(jnp.asarray(teacher.logits), axis=1)
    return jnp.mean(nats(jnp.asarray(student.logits), classes))


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table with labels.

    Attributes:
      metric: a name for `kd2m_jax.fit`, a function, or None for the labels alone.
      untrained: whether the teacher is the same network before training.
      all_labels: whether the validation labels are trained on, too: there is no lambda to choose.
      shorter: whether it is trained for a third of the steps.
    """

    metric: str | Callable | None
    untrained: bool = False
    all_labels: bool = False
    shorter: bool = False


NONE = "none"
# The student alone, and what a reviewer would hold against the others.
CONTROLS = {
    NONE: Row(None),
    "none, validation labels trained on": Row(None, all_labels=True),
    "none, a third of the steps": Row(None, shorter=True),
    "cross-entropy on the teacher's classes": Row(teacher_classes),
    "l2 to an untrained teacher": Row("l2", untrained=True),
    "cw2 to an untrained teacher": Row("cw2", untrained=True),
    "class means": Row("cmmd-linear"),
}
METRICS = (
    # the paper's six
    "w2", "cw2", "jw2", "gaussian-w2", "gaussian-cw2", "gaussian-kl",
    # held to the classes; with variances alone
    "jw2:beta=1000", "gaussian-ckl", "gaussian-w2:covariance=diagonal",
    "gaussian-cw2:covariance=diagonal", "gaussian-kl:covariance=diagonal",
    # other distances between distributions
    "sw2", "scf", "mmd-rbf", "cmmd-rbf",
    # row by row
    "l2", "kd", "kd:standardize=true",
    # up to a rotation
    "procrustes", "gram", "cka", "cw2:rotation=true", "gaussian-cw2:rotation=true",
    # sums
    "kd+cw2", "kd+procrustes",
)  # fmt: skip
ROWS = {**CONTROLS, **{metric: Row(metric) for metric in METRICS}}
# What can be trained without labels: jw2 takes logits of the student's that nothing trains then.
LABEL_FREE = tuple(
    row
    for row, one in ROWS.items()
    if not (one.all_labels or one.shorter or str(one.metric).startswith("jw2"))
)
