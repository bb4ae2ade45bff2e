"""The one place where a loss is found by name: METRICS, get_metric, distillation_loss."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import class_labels, did_you_mean, floating
from kd2m_jax.losses._gaussian import gaussian_ckl, gaussian_cw2, gaussian_kl, gaussian_w2
from kd2m_jax.losses._pointwise import l2
from kd2m_jax.losses._transport import cw2, jw2, w2
from kd2m_jax.outputs import Outputs


class MetricInfo(NamedTuple):
    """One line of the catalogue.

    Attributes:
      function: the public loss.
      formula: what it computes, in one line.
      source: where it comes from.
      options: what this name sets beforehand (a preset); `get_metric` may override it.
    """

    function: Callable[..., Any]
    formula: str
    source: str
    options: dict[str, Any] = {}  # noqa: RUF012  (read only)

    @property
    def description(self) -> str:
        """The first line of the loss's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def needs(self) -> tuple[str, ...]:
        """What it takes beyond features: some of "labels", "logits", "maps", "key"."""
        parameters = inspect.signature(self.function).parameters
        stems = dict.fromkeys(name.removesuffix("_s").removesuffix("_t") for name in parameters)
        return tuple(stem for stem in stems if stem in ("labels", "logits", "maps", "key"))


KD2M = "KD2M, Fernandes Montesuma, GSI 2025"

METRICS: dict[str, MetricInfo] = {
    "w2": MetricInfo(w2, "min_P sum_ij P_ij |z_i^S - z_j^T|^2", KD2M),
    "cw2": MetricInfo(cw2, "1/K sum_y W2^2(P_S(Z|y), P_T(Z|y))", KD2M),
    "jw2": MetricInfo(jw2, "min_P sum_ij P_ij (|z_i^S - z_j^T|^2 + beta L(h_i^S, h_j^T))", KD2M),
    "gaussian-w2": MetricInfo(
        gaussian_w2, "|mu_S - mu_T|^2 + Tr(S_S + S_T - 2 (S_S^1/2 S_T S_S^1/2)^1/2)", KD2M
    ),
    "gaussian-cw2": MetricInfo(gaussian_cw2, "1/K sum_y gaussian_w2 within class y", KD2M),
    "gaussian-kl": MetricInfo(gaussian_kl, "KL(N(mu_S, S_S + s I) || N(mu_T, S_T + s I))", KD2M),
    "gaussian-ckl": MetricInfo(gaussian_ckl, "1/K sum_y gaussian_kl within class y", KD2M),
    "l2": MetricInfo(l2, "1/n sum_i |z_i^S - z_i^T|^2", "FitNets, Romero et al., ICLR 2015"),
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A loss chosen by name, with its options: a function of two networks' `Outputs`.

    Made by `get_metric`. Calling it gives a scalar; ``labels`` are ``[n]`` integers and ``key``
    a PRNG key, both needed by some metrics only.

    Attributes:
      name: its name in METRICS, with dashes.
      on: "features" or "logits", what takes the place of the features.
      options: the loss's options, as sorted pairs.
    """

    name: str
    on: str = "features"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """What it takes beyond features: some of "labels", "logits", "maps", "key"."""
        needs = METRICS[self.name].needs
        return needs if self.on == "features" or "logits" in needs else (*needs, "logits")

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs,
        labels: ArrayLike | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The distance between the two networks' outputs: a scalar."""
        function = METRICS[self.name].function
        student, teacher = Outputs(*student), Outputs(*teacher)
        available = {
            "z_s": getattr(student, self.on),
            "z_t": getattr(teacher, self.on),
            "logits_s": student.logits,
            "logits_t": teacher.logits,
            "maps_s": student.maps or None,
            "maps_t": teacher.maps or None,
            "labels": labels,
            "key": key,
        }
        given = {p: available[p] for p in inspect.signature(function).parameters if p in available}
        missing = [p for p, value in given.items() if value is None]
        if missing:
            raise ValueError(f"metric {self.name!r} needs {' and '.join(missing)}, and got none")
        return function(**given, **dict(self.options))


def get_metric(name: str, *, on: str = "features", **options) -> Metric:
    """Look a metric up in METRICS and set its options.

    Args:
      name: a key of METRICS; dashes and underscores are the same. ``"w2@logits"`` is
        ``get_metric("w2", on="logits")``.
      on: "features", or "logits" to put the logits in the place of the features.
      **options: the loss's keyword options, ``beta=0.5`` for "jw2", say.

    Returns:
      A `Metric`: ``(student: Outputs, teacher: Outputs, labels, *, key=None) -> scalar``.
      Hashable, so it may be a static argument of a jitted function.

    Raises:
      ValueError: an unknown name (with the nearest ones), or an option out of range.
      TypeError: an option that the loss does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> metric = get_metric("jw2", beta=0.5)
      >>> out = Outputs(jnp.eye(4), jnp.zeros((4, 2)))
      >>> print(f"{metric(out, out, None):.4f}")  # 0.5 log 2: the cross-entropy of a coin
      0.3466
    """
    name, _, at = name.replace("_", "-").lower().partition("@")
    on = at or on
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: {did_you_mean(name, METRICS)}")
    if on not in ("features", "logits"):
        raise ValueError(f"a metric is on 'features' or on 'logits', not on {on!r}")
    info = METRICS[name]
    allowed = [
        p.name
        for p in inspect.signature(info.function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in ("key", "has_aux")
    ]
    for option in options:
        if option not in allowed:
            hint = did_you_mean(option, allowed) if allowed else "it has none"
            raise TypeError(f"metric {name!r} has no option {option!r}: {hint}")
    metric = Metric(name, on, tuple(sorted({**info.options, **options}.items())))
    _try_out(metric)
    return metric


def _try_out(metric: Metric) -> None:
    """Trace the metric once on a tiny batch, so that a bad option shows here and not later."""
    out = Outputs(jnp.zeros((4, 2)), jnp.zeros((4, 2)), (jnp.zeros((4, 2, 2, 2)),))
    jax.eval_shape(lambda key: metric(out, out, jnp.zeros(4, int), key=key), jax.random.key(0))


class LossTerms(NamedTuple):
    """The parts of a distillation loss, both scalars: unweighted, so that runs compare.

    Attributes:
      task: the cross-entropy on the labels, in nats.
      distillation: the metric's value, in its own unit.
    """

    task: jax.Array
    distillation: jax.Array


def distillation_loss(
    student: Outputs,
    teacher: Outputs,
    labels: ArrayLike,
    *,
    metric: Metric | str | None,
    coef: jax.Array | float,
    task_coef: jax.Array | float = 1.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, LossTerms]:
    """The student's loss: ``task_coef * cross-entropy + coef * metric(student, teacher)``.

    Args:
      student: `Outputs` for the batch; its logits ``[n, k]`` are needed.
      teacher: `Outputs` for the same batch. No gradient flows to it.
      labels: ``[n]`` integers in [0, k).
      metric: a name, a `Metric`, or None (or "none") for the cross-entropy alone.
      coef: >= 0, the weight lambda of the distance; may be traced.
      task_coef: >= 0, the weight of the cross-entropy; may be traced.
      key: a PRNG key, for metrics that draw.

    Returns:
      ``(loss, LossTerms(task, distillation))``, float32 scalars. The loss is in nats plus
      lambda times the metric's unit (squared distance or nats).

    Raises:
      ValueError: a negative weight, or a metric that needs what it was not given.
      TypeError: labels that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> out = Outputs(jnp.eye(3), jnp.zeros((3, 2)))
      >>> loss, terms = distillation_loss(out, out, jnp.array([0, 1, 1]), metric="l2", coef=1.0)
      >>> print(f"{loss:.4f} {terms.task:.4f} {terms.distillation:.4f}")
      0.6931 0.6931 0.0000

    References:
      Fernandes Montesuma, KD2M, GSI 2025, Algorithm 1.
    """
    student, teacher = Outputs(*student), Outputs(*teacher)
    for name, weight in (("coef", coef), ("task_coef", task_coef)):
        if not isinstance(weight, jax.core.Tracer) and not float(weight) >= 0:
            raise ValueError(f"{name} must be >= 0, got {weight}")
    if student.logits is None:
        raise ValueError("the student's Outputs have no logits, which the cross-entropy needs")
    logits = floating("the student's logits", student.logits)
    labels = class_labels(labels, logits.shape[0])
    task = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))
    if isinstance(metric, str):
        metric = None if metric == "none" else get_metric(metric)
    if metric is None:
        distillation = jnp.zeros_like(task)
    else:
        distillation = metric(student, jax.lax.stop_gradient(teacher), labels, key=key)
    total = jnp.asarray(task_coef) * task + jnp.asarray(coef) * distillation
    return total, LossTerms(task, distillation)
