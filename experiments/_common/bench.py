"""Timing losses side by side: alternating, forward and backward, medians with spread."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax import Outputs, losses


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss on one input.

    Attributes:
      metric: a name of ``losses.METRICS``.
      classes: how many classes the batch has; 0 for a marginal loss.
      run: calls it once, forward and backward, and waits for the result.
    """

    metric: str
    classes: int
    run: Callable[[], object]


def clouds(n: int, d: int, classes: int, seed: int):
    """Student and teacher features of a half-trained student: ``[n, d]``, and labels ``[n]``."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    teacher = rng.normal(size=(classes, d))[labels] + 0.5 * rng.normal(size=(n, d))
    student = teacher + 0.5 * rng.normal(size=(n, d))
    return *(jnp.asarray(z, jnp.float32) for z in (student, teacher)), jnp.asarray(labels)


def case(metric: str, n: int, d: int, classes: int, seed: int = 0) -> Case:
    """Compile a loss and its gradient with respect to the student's features."""
    z_s, z_t, labels = clouds(n, d, classes, seed)
    distance = losses.get_metric(metric)

    @jax.jit
    def both(z_s):
        return jax.value_and_grad(lambda z: distance(Outputs(z), Outputs(z_t), labels))(z_s)

    jax.block_until_ready(both(z_s))
    return Case(metric, classes, lambda: jax.block_until_ready(both(z_s)))


def measure(cases: list[Case], repeats: int) -> list[dict]:
    """Milliseconds of each case, measured in turn so that a slow moment hits them all."""
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(repeats):
        for case, spent in zip(cases, times, strict=True):
            start = time.perf_counter()
            case.run()
            spent.append(1e3 * (time.perf_counter() - start))
    return [
        {
            "metric": case.metric,
            "classes": case.classes,
            "median_ms": statistics.median(spent),
            "min_ms": min(spent),
            "max_ms": max(spent),
        }
        for case, spent in zip(cases, times, strict=True)
    ]


def class_count(metrics, counts, n: int, d: int, repeats: int) -> list[dict]:
    """What the number of classes costs: the same batch cut into few and into many classes."""
    results = []
    for metric in metrics:
        rows = measure([case(metric, n, d, k) for k in counts], repeats)
        for row in rows:
            row["ratio"] = row["median_ms"] / rows[0]["median_ms"]
        results += rows
    return results


def text_table(rows: list[dict]) -> str:
    """The rows for a terminal, times in milliseconds."""
    lines = [f"{'metric':<14}{'classes':>8}{'median':>10}{'min':>10}{'max':>10}{'ratio':>8}"]
    for row in rows:
        numbers = "".join(f"{row[k]:>10.2f}" for k in ("median_ms", "min_ms", "max_ms"))
        lines.append(f"{row['metric']:<14}{row['classes']:>8}{numbers}{row['ratio']:>8.2f}")
    return "\n".join(lines)
