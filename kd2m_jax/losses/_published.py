"""The weights that a method's authors gave it."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike

from kd2m_jax.losses._catalogue import METRICS
from kd2m_jax.losses._checks import integer
from kd2m_jax.losses._metrics import MetricSum, get_metric


def published(name: str, total_steps: int) -> tuple[float | Callable[[ArrayLike], Any], float]:
    """How strongly a method's authors weighted it: ``task_coef CE + coef D``.

    For `kd2m_jax.fit`, `kd2m_jax.make_train_step` and a loop of your own. "kd" 0.9 beside 0.1, for
    T = 4; "nst" 25; "wkd-l" 600 and "wkd-f" 0.08, both for resnet32x4 -> resnet8x4 on CIFAR-100,
    falling to 0 by a cosine from epoch 150 of 240 on, in proportion for other lengths. These
    losses' other options are published values by default. Of "wkd-l" the published schedule
    leaves the target's term L_t at weight 1, and this one lowers it along with the distance:
    for the letter of it, add L_t in your own loop and set ``target_coef=0``.

    Args:
      name: a metric as `get_metric` takes it, options included; no sum.
      total_steps: >= 1, of the whole training, all epochs together.

    Returns:
      ``(coef, task_coef)``: coef is a number, or an optax schedule of the step where it decays.

    Raises:
      ValueError: a metric without published weights, standardized logits, a sum of metrics,
        total_steps < 1.

    Example:
      >>> published("kd", 1000)
      (0.9, 0.1)
      >>> coef, task_coef = published("wkd-f", 240)
      >>> print(f"{coef(150):.2f} {coef(195):.2f} {coef(240):.2f} {task_coef}")
      0.08 0.04 0.00 1.0
    """
    total_steps = integer("total_steps", total_steps)
    metric = get_metric(name)
    having = [known for known, info in METRICS.items() if info.published]
    weights = None if isinstance(metric, MetricSum) else METRICS[metric.name].published
    if not isinstance(metric, MetricSum) and dict(metric.options).get("standardize"):
        raise ValueError("the published weights of kd are not those of standardized logits")
    if weights is None:
        raise ValueError(f"{metric.label} has no published weights: {', '.join(having)} have")
    if weights.decay_from == 1:
        return weights.coef, weights.task_coef
    start = round(weights.decay_from * total_steps)
    decay = optax.cosine_decay_schedule(weights.coef, max(total_steps - start, 1))
    schedule = optax.join_schedules([optax.constant_schedule(weights.coef), decay], [start])
    return schedule, weights.task_coef
