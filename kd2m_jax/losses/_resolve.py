"""From whatever a caller gives as a metric to what is called."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from kd2m_jax._outputs import Outputs
from kd2m_jax.losses._catalogue import METRICS
from kd2m_jax.losses._metrics import Metric, MetricSum, get_metric, on_cpu

# A metric, its name, a loss of ours, or a function (Outputs, Outputs, labels) of the caller's own.
AnyMetric: TypeAlias = Metric | MetricSum | str | Callable | None


def resolve(metric: AnyMetric) -> Metric | MetricSum | Callable | None:
    """Return a metric by whatever it was given: itself, its name, its loss, or none."""
    if metric is None or (isinstance(metric, str) and metric == "none"):
        return None
    if isinstance(metric, str):
        return get_metric(metric)
    if isinstance(metric, list | tuple):
        raise TypeError("several metrics at once are one as 'kd+cw2' or losses.metric_sum([...])")
    if not callable(metric):
        raise TypeError(f"metric must be a name or a losses.Metric, got {type(metric)}")
    function, options = metric, {}
    if isinstance(metric, functools.partial) and not metric.args:
        function, options = metric.func, metric.keywords
    for name, info in METRICS.items():
        if info.function is function:
            chosen = {p.name: p.default for p in inspect.signature(function).parameters.values()}
            chosen |= options
            if all(chosen[option] == value for option, value in info.options.items()):
                return get_metric(name, **{k: options[k] for k in options if k not in info.options})
    return metric


def for_cpu(metric: AnyMetric) -> Metric | MetricSum | Callable | None:
    """Return a metric for programs that only a CPU will run: the same values by the same plans.

    Where the solver is left to "auto" the accelerators' one is not even traced: that is a tenth of
    a second for each program, and the import of ott-jax.
    """
    found = resolve(metric)
    if isinstance(found, MetricSum):
        return dataclasses.replace(found, metrics=tuple(map(on_cpu, found.metrics)))
    return on_cpu(found) if isinstance(found, Metric) else found


def compared(metric: Any, student: Outputs, teacher: Any, labels: Any, **given: Any) -> jax.Array:
    """Call a metric; one of the caller's own gets of the named arguments those that it names."""
    if not isinstance(metric, Metric | MetricSum):
        parameters = inspect.signature(metric).parameters.values()
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            names = {p.name for p in parameters}
            given = {name: value for name, value in given.items() if name in names}
    return metric(student, teacher, labels, **given)
