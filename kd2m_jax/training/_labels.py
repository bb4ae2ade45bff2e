"""Which class a conditional metric takes for an example without a label."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from kd2m_jax._outputs import Outputs
from kd2m_jax.losses import Metric, MetricSum

RULES = ("teacher", "drop", "own", "balanced")
# A rule's name, ("balanced", shares), or None for the usual one.
Unlabelled: TypeAlias = str | tuple[str, Sequence[float]] | None

_ITERATIONS = 100


def check_rule(rule: Any) -> Unlabelled:
    """Return a rule in the form that steps take; ValueError for what is none."""
    if rule is None or (isinstance(rule, str) and rule in RULES):
        return rule
    if isinstance(rule, tuple | list) and len(rule) == 2 and rule[0] == "balanced":
        shares = np.asarray(rule[1], np.float64)
        if shares.ndim == 1 and len(shares) and np.isfinite(shares).all() and (shares > 0).all():
            return "balanced", tuple((shares / shares.sum()).tolist())
        raise ValueError(
            f"the shares of 'balanced' must be numbers > 0, one per class, got {rule[1]}"
        )
    raise ValueError(
        f"unlabelled must be one of {', '.join(map(repr, RULES))}, ('balanced', shares) or None, "
        f"got {rule!r}"
    )


def classes_for(
    rule: Unlabelled, labels: jax.Array, student: Outputs, teacher: Outputs | None
) -> jax.Array:
    """Give the rows of -1 the class that the rule says; constants for the gradient.

    Args:
      rule: as `check_rule` returns it. None is "teacher" where the teacher has logits, else
        "balanced".
      labels: ``[n]`` integers, of the global batch.
      student: its outputs for the same rows.
      teacher: likewise, or None where it has not seen them.

    Returns:
      ``[n]`` integers; -1 remains under "drop".
    """
    predicted = None if teacher is None else teacher.logits
    rule = rule or ("balanced" if predicted is None else "teacher")
    if rule == "drop":
        return labels
    if rule == "teacher":
        if predicted is None:
            raise ValueError(
                "unlabelled='teacher' takes the teacher's logits for the same images, and there "
                "are none"
            )
        found = jnp.argmax(jnp.asarray(predicted), axis=1)
    else:
        if student.logits is None:
            raise ValueError(f"unlabelled={rule!r} takes the student's logits, and it has none")
        logits = jax.lax.stop_gradient(jnp.asarray(student.logits))
        if rule != "own":
            shares = None if isinstance(rule, str) else jnp.asarray(rule[1])
            logits = balanced(logits, labels == -1, shares)
        found = jnp.argmax(logits, axis=1)
    return jnp.where(labels == -1, found.astype(labels.dtype), labels)


def balanced(logits: jax.Array, where: jax.Array, shares: jax.Array | None) -> jax.Array:
    """Return log-probabilities ``[n, k]`` whose means over the given rows are the shares.

    The nearest ones to the softmax in the sense of Kullback and Leibler: rows and columns are
    normalised in turn (Sinkhorn & Knopp 1967), in the log domain.
    """
    k = logits.shape[1]
    if shares is not None and shares.shape != (k,):
        raise ValueError(f"'balanced' has {len(shares)} shares, and there are {k} classes")
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    target = jnp.full(k, -jnp.log(k)) if shares is None else jnp.log(shares)
    rows = jnp.where(where, 0.0, -jnp.inf)[:, None]
    count = jnp.log(jnp.maximum(jnp.sum(where), 1))

    def iterate(_, log_p):
        columns = logsumexp(log_p + rows, axis=0) - count
        columns = jnp.where(jnp.any(where), target - columns, 0)
        return jax.nn.log_softmax(log_p + columns[None, :], axis=1)

    return jax.lax.fori_loop(0, _ITERATIONS, iterate, log_p)


def are_class_numbers(labels: Any) -> bool:
    """Tell class numbers ``[n]`` from labels of other kinds."""
    return np.ndim(labels) == 1 and jnp.issubdtype(labels.dtype, jnp.integer)


def needs_labels(metric: Metric | MetricSum | Any) -> bool:
    """Tell whether a metric reads labels; of a function of one's own that is not known."""
    return metric is not None and "labels" in getattr(metric, "needs", ("labels",))
