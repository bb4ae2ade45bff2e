"""Metrics: a loss by its name and options, and sums of them."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd2m_jax._outputs import Outputs
from kd2m_jax.losses._catalogue import METRICS
from kd2m_jax.losses._checks import PER_CALL, TRACED, did_you_mean, number, shown, static
from kd2m_jax.losses._solvers import AUTO_ON_CPU, DEFAULT_SOLVER
from kd2m_jax.losses._spelling import as_written, option_of, spelled, terms
from kd2m_jax.losses._statistics import ClassStatistics


@dataclasses.dataclass(frozen=True)
class Metric:
    """A loss chosen by name, with its options: a function of two networks' `Outputs`.

    Made by `get_metric`. Calling it gives a scalar; ``labels`` are ``[n]`` integers (-1: none) and
    ``key`` a PRNG key, both needed by some metrics only. ``where`` are the rows ``[n]`` (bool) that
    count, ``labels_t`` the classes ``[m]`` of the teacher's rows where they are other examples.

    Attributes:
      name: its name in METRICS, with dashes.
      on: "features" or "logits", what takes the place of the features.
      options: the loss's options, as sorted pairs.

    Example:
      >>> metric = get_metric("W2@logits:solver=exact")
      >>> metric.name, metric.on, metric.options, metric.needs
      ('w2', 'logits', (('solver', 'exact'),), ('logits',))
      >>> metric.label, metric.written
      ('w2@logits', 'w2@logits:solver=exact')
    """

    name: str
    on: str = "features"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """Its name as the command line has it: "w2", "w2@logits"."""
        return self.name if self.on == "features" else f"{self.name}@{self.on}"

    @property
    def written(self) -> str:
        """Its label with the options set: "w2:solver=ipot"; arrays are left out."""
        own = METRICS[self.name].options
        left_out = _Array | Unsaid
        chosen = [(k, v) for k, v in self.options if k not in own and not isinstance(v, left_out)]
        return ":".join([self.label, *(f"{k}={as_written(v)}" for k, v in chosen)])

    @property
    def needs(self) -> tuple[str, ...]:
        """What it takes beyond features: some of "labels", "logits", "maps", "key"."""
        needs = METRICS[self.name].needs
        return needs if self.on == "features" or "logits" in needs else (*needs, "logits")

    @property
    def projector(self) -> str | None:
        """What must be of the teacher's size: "features", "maps" or, None, nothing."""
        info = METRICS[self.name]
        compares = "z_s" in inspect.signature(info.function).parameters
        without = info.projector == "features" and not (compares and self.on == "features")
        return None if without else info.projector

    @property
    def takes_statistics(self) -> bool:
        """Whether a teacher of which only `ClassStatistics` are left will do."""
        return self.on == "features" and self.name.startswith("gaussian-")

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | ClassStatistics,
        labels: ArrayLike | None = None,
        *,
        labels_t: ArrayLike | None = None,
        where: ArrayLike | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the distance between the two networks' outputs: a scalar."""
        function = METRICS[self.name].function
        student = as_outputs("student", student)
        if isinstance(teacher, ClassStatistics):
            teacher, labels_t = self._of_statistics(teacher, len(student.features), key)
        else:
            teacher = as_outputs("teacher", teacher)
        available = {
            "z_s": getattr(student, self.on),
            "z_t": getattr(teacher, self.on),
            "logits_s": student.logits,
            "logits_t": teacher.logits,
            "maps_s": _stages(student),
            "maps_t": _stages(teacher),
            "labels": labels,
            "key": key,
        }
        given = {p: available[p] for p in inspect.signature(function).parameters if p in available}
        missing = [p for p, value in given.items() if value is None]
        if missing:
            lacking = " and ".join(map(self._called, missing))
            raise ValueError(f"metric {self.label!r} needs {lacking}, and got none")
        options = {k: v.array if isinstance(v, _Array) else v for k, v in self.options}
        if where is not None:
            options["where"] = where
        # Losses without classes do not ask of which the teacher's rows are.
        if labels_t is not None and METRICS[self.name].paired:
            raise ValueError(
                f"metric {self.label!r} compares each example with itself: it takes no labels_t"
            )
        if labels_t is not None and "labels_t" in inspect.signature(function).parameters:
            options["labels_t"] = labels_t
        return function(**given, **options)

    def _of_statistics(
        self, teacher: ClassStatistics, n: int, key: jax.Array | None
    ) -> tuple[Outputs, jax.Array | None]:
        """Return what a loss takes of statistics: themselves, or n rows drawn with the key."""
        if self.takes_statistics:
            return Outputs(teacher), None  # pyright: ignore[reportArgumentType]
        if key is None:
            raise ValueError(
                f"metric {self.label!r} compares samples, and the teacher is class statistics: "
                "give a key to draw rows with, or use a Gaussian metric"
            )
        features, labels = teacher.draw(jax.random.fold_in(key, 2**32 - 1), n)
        return Outputs(features), labels

    def _called(self, parameter: str) -> str:
        """Return what users call a loss's parameter: "the student's features" for z_s."""
        stem, _, side = parameter.rpartition("_")
        owner = {"s": "the student's", "t": "the teacher's"}.get(side)
        return f"{owner} {self.on if stem == 'z' else stem}" if owner else parameter


def _stages(outputs: Outputs) -> Any:
    """Return the maps, of several stages or one array of a single stage, or None."""
    maps = outputs.maps
    return None if isinstance(maps, tuple | list) and not maps else maps


def as_outputs(owner: str, given: Any) -> Outputs:
    """Make `Outputs` from what a network may return: such a tuple, plain or named."""
    if isinstance(given, ClassStatistics):
        raise TypeError(
            f"the {owner}'s outputs are wanted here, one row per example, not statistics"
        )
    if not isinstance(given, tuple | list) or not 1 <= len(given) <= 3:
        shape = getattr(given, "shape", None)
        kind = type(given) if shape is None else f"an array of shape {list(shape)}"
        raise TypeError(
            f"the {owner}'s outputs must be kd2m_jax.Outputs or a tuple (features, logits, maps), "
            f"got {kind}: features alone are Outputs(features)"
        )
    return Outputs(*given)


@dataclasses.dataclass(frozen=True)
class MetricSum:
    """A weighted sum of metrics, itself a metric: ``sum_i weight_i D_i``.

    Made by `metric_sum`, or by `get_metric` from "kd+cw2".

    Attributes:
      metrics: the terms.
      weights: one per term, >= 0 and finite.

    Example:
      >>> both = get_metric("kd:temperature=2+cw2", weights=[0.9, 1e-3])
      >>> both.label, both.weights, both.needs
      ('kd:temperature=2+cw2', (0.9, 0.001), ('logits', 'labels'))
    """

    metrics: tuple[Metric, ...]
    weights: tuple[float, ...]

    @property
    def label(self) -> str:
        """The terms, with their options, and plus signs between them."""
        return "+".join(m.written for m in self.metrics)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the terms together take beyond features."""
        return tuple(dict.fromkeys(need for m in self.metrics for need in m.needs))

    def parts(
        self,
        student: Outputs,
        teacher: Outputs | ClassStatistics,
        labels: ArrayLike | None = None,
        *,
        labels_t: ArrayLike | None = None,
        where: ArrayLike | None = None,
        key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Each term's own value, unweighted, as it is written (numbered where one recurs)."""
        values: dict[str, jax.Array] = {}
        for i, metric in enumerate(self.metrics):
            name = metric.written if metric.written not in values else f"{metric.written}-{i + 1}"
            own_key = None if key is None else jax.random.fold_in(key, i)
            values[name] = metric(
                student, teacher, labels, labels_t=labels_t, where=where, key=own_key
            )
        return values

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | ClassStatistics,
        labels: ArrayLike | None = None,
        *,
        labels_t: ArrayLike | None = None,
        where: ArrayLike | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the weighted sum: a scalar."""
        return self.weigh(
            self.parts(student, teacher, labels, labels_t=labels_t, where=where, key=key)
        )

    def weigh(self, parts: dict[str, jax.Array]) -> jax.Array:
        """Return the sum of what `parts` returned."""
        terms = [w * part for w, part in zip(self.weights, parts.values(), strict=True)]
        return jnp.sum(jnp.stack(terms))


def metric_sum(metrics: Sequence[Metric], weights: Sequence[float] | None = None) -> MetricSum:
    """Several metrics at once, on several layers if you like, each with its weight.

    Args:
      metrics: what `get_metric` returned, with whatever options.
      weights: one per metric, >= 0; all 1 by default. They multiply ``coef``.

    Returns:
      A `MetricSum`, which goes wherever a `Metric` does; training reports each term apart.

    Raises:
      ValueError: no metrics, a number of weights that is not theirs, or a weight that is negative
        or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> both = metric_sum([get_metric("l2"), get_metric("l2", on="logits")], [1.0, 10.0])
      >>> one = Outputs(jnp.zeros((4, 2)), jnp.zeros((4, 3)))
      >>> other = Outputs(jnp.ones((4, 2)))
      >>> print(both(one, other._replace(logits=jnp.ones((4, 3)))))  # 2 + 10 * 3
      32.0
    """
    weights = tuple(map(float, weights if weights is not None else [1.0] * len(metrics)))
    if not metrics or len(weights) != len(metrics):
        raise ValueError(
            f"a weight for each metric is needed, got {len(metrics)} metrics and {len(weights)} "
            "weights"
        )
    for weight in weights:
        number("weights", weight, positive=False)
    return MetricSum(tuple(metrics), weights)


class Unsaid(str):
    """An option that goes without saying: a metric is written without it."""


def on_cpu(metric: Metric) -> Metric:
    """Return a metric whose solver, where that is left to "auto", is the one for a CPU."""
    options = dict(metric.options)
    parameters = inspect.signature(METRICS[metric.name].function).parameters
    solver = options.get("solver", Unsaid(DEFAULT_SOLVER))
    if "solver" not in parameters or solver != "auto" or not isinstance(solver, Unsaid):
        return metric
    options["solver"] = Unsaid(AUTO_ON_CPU)
    return dataclasses.replace(metric, options=tuple(sorted(options.items())))


class _Array:
    """An array among a metric's options: hashable, and equal to another of the same values."""

    def __init__(self, array: ArrayLike):
        self.array = array
        traced = isinstance(array, jax.core.Tracer)
        values = None if traced else np.ascontiguousarray(array)
        self.key = (
            id(self) if values is None else (values.shape, str(values.dtype), values.tobytes())
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Array) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"array of shape {list(np.shape(self.array))}"


def get_metric(name: str, *, on: str = "features", **options: object) -> "Metric | MetricSum":
    """Look a metric up in METRICS and set its options.

    Args:
      name: a key of METRICS; dashes and underscores are the same. ``"w2@logits"`` is
        ``get_metric("w2", on="logits")``, ``"jw2:beta=0.5"`` is ``get_metric("jw2", beta=0.5)``
        (several options with a colon before each), and ``"kd+cw2"`` the `metric_sum` of both.
      on: "features", or "logits" to put the logits in the place of the features.
      **options: the loss's keyword options, ``beta=0.5`` for "jw2", say; of a sum only
        ``weights``, one a term.

    Returns:
      A `Metric`: ``(student: Outputs, teacher: Outputs | ClassStatistics, labels, *,
      labels_t=None, where=None, key=None) -> scalar``.
      Hashable, so it may be a static argument of a jitted function. Of a sum a `MetricSum`.

    Raises:
      ValueError: an unknown name (with the nearest ones), an option out of range, given twice, or
        one that the name has set already ("mmd-rbf" is the kernel).
      TypeError: an option that the loss does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> metric = get_metric("jw2", beta=0.5)
      >>> out = Outputs(jnp.eye(4), jnp.zeros((4, 2)))
      >>> print(f"{metric(out, out, None):.4f}")  # 0.5 log 2: the cross-entropy of a coin
      0.3466
    """
    name = spelled(name)
    if len(terms(name)) == 1:
        return _single(name, on, options)
    weights: Any = options.pop("weights", None)
    if options:
        raise TypeError("options of a sum's terms: in their names, as in 'kd:temperature=2+w2'")
    return metric_sum([_single(term, on, {}) for term in terms(name)], weights)


def _single(name: str, on: str, options: dict[str, Any]) -> Metric:
    """Make a metric that is no sum of its spelled name and its options."""
    name, *written = name.split(":")
    for option, value in map(option_of, written):
        if option in options:
            raise ValueError(f"metric {name!r} is given {option} twice")
        options[option] = value
    name, _, at = name.partition("@")
    on = at or on
    if name not in METRICS:
        raise ValueError(f"unknown metric {shown(repr(name))}: {did_you_mean(name, METRICS)}")
    if on not in ("features", "logits"):
        raise ValueError(f"a metric is on 'features' or on 'logits', not on {on!r}")
    info = METRICS[name]
    allowed = [
        p.name
        for p in inspect.signature(info.function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in PER_CALL
    ]
    for option in options:
        if option not in allowed:
            hint = did_you_mean(option, allowed) if allowed else "it has none"
            raise TypeError(f"metric {name!r} has no option {shown(repr(option))}: {hint}")
        if option in info.options:
            raise ValueError(
                f"metric {name!r} has {option}={info.options[option]!r} by its name, so {option} "
                "cannot be set"
            )
    held = {
        key: _Array(np.asarray(value) if isinstance(value, list | tuple) else value)
        if key in TRACED
        else static(key, value)
        for key, value in {**info.options, **options}.items()
    }
    metric = Metric(name, on, tuple(sorted(held.items())))
    if options:  # the defaults are good; tracing takes 0.05 to 0.9 CPU s
        _try_out(on_cpu(metric))  # which is less to trace, and refuses the same
    return metric


def _try_out(metric: Metric) -> None:
    """Trace the metric once on a tiny batch, so that a bad option shows here and not later."""

    def array(*shape, dtype=jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    # As many classes as a matrix of costs has, sixteen stages for `stages` to choose from, and
    # maps that every grid up to 10 divides: nothing is computed, so size costs nothing.
    cost = dict(metric.options).get("class_cost")
    classes = np.shape(cost.array)[0] if isinstance(cost, _Array) else 3
    out = Outputs(array(4, 2), array(4, classes), (array(4, 2520, 2520, 2),) * 16)
    call = lambda out, labels, key: metric(out, out, labels, key=key)  # noqa: E731
    jax.eval_shape(call, out, array(4, dtype=jnp.int32), jax.random.key(0))
