"""coef="auto": lambda from the norms of the two terms' gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# The ratio if none is given, and how much of the means of the gradients' norms a step keeps.
RATIO, MEMORY = 0.1, 0.8


def auto_ratio(coef: str) -> float:
    """Return RATIO of "auto:RATIO", or of "auto" the default; ValueError for anything else."""
    name, _, ratio = coef.partition(":")
    try:
        value = float(ratio or RATIO)
    except ValueError:
        value = 0.0
    if name != "auto" or not 0 < value < float("inf"):
        raise ValueError(
            f"coef must be a number >= 0, a schedule, 'auto' or 'auto:RATIO' with RATIO > 0, got "
            f"{coef!r} (authors' weights: losses.published)"
        )
    return value


def balanced_gradients(
    loss_fn: Callable[[Any], Any],
    mean: Callable[[Any], Any],
    params: Any,
    norms: jax.Array,
    *,
    ratio: float,
    task_coef: Any,
):
    """Weigh the two terms' gradients so that their norms keep the ratio.

    Args:
      loss_fn: ``params -> (loss, aux)``, where ``aux[0]`` are the unweighted `LossTerms`.
      mean: the mean over devices.
      params: the student's parameters.
      norms: ``[2]``, the means of both norms so far.
      ratio: the norm of lambda's part in units of the other part's.
      task_coef: the weight of the cross-entropy.

    Returns:
      ``(loss, aux, gradients, lambda, norms)``.
    """

    # The two terms' gradients apart, from one forward pass.
    def terms_fn(params):
        _, aux = loss_fn(params)
        return (aux[0].task, aux[0].distillation), aux

    (task, distance), pullback, aux = jax.vjp(terms_fn, params, has_aux=True)
    (of_task,) = pullback((jnp.full_like(task, task_coef), jnp.zeros_like(distance)))
    (of_distance,) = pullback((jnp.zeros_like(task), jnp.ones_like(distance)))
    of_task, of_distance = mean(of_task), mean(of_distance)
    new = jnp.stack([optax.tree.norm(g) for g in (of_task, of_distance)])
    # Both start at zero, so the bias of the first steps cancels in their ratio.
    norms = MEMORY * norms + (1 - MEMORY) * new.astype(norms.dtype)
    coef = jnp.where(norms[1] > 0, ratio * norms[0] / norms[1], 0)
    gradients = jax.tree.map(lambda t, d: t + coef * d, of_task, of_distance)
    return task_coef * task + coef * distance, aux, gradients, coef, norms
