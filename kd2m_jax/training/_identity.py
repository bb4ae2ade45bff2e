"""Compare a resumed run with its checkpoint: what decides a run's result, by values."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd2m_jax.errors import CheckpointError
from kd2m_jax.losses import METRICS, Metric, MetricSum
from kd2m_jax.losses._checks import PER_CALL
from kd2m_jax.losses._resolve import compared, resolve
from kd2m_jax.losses._spelling import spelled, terms
from kd2m_jax.training._auto_coef import auto_ratio

# Programs can be compared as text where the same versions have made both.
_VERSIONS = f"(jax {jax.__version__}, optax {optax.__version__})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """What decides the result of a run.

    Attributes:
      metrics: one per student.
      coefs: likewise.
      task_coef: the weight of the cross-entropy.
      teacher: its variables, or None.
      data: ``(inputs, labels)``, or None for an iterable.
      optimizer: None for the default one, whose schedule follows the number of steps.
      params: the first student's parameters.
      outputs: gives the shapes of a student's and of the teacher's outputs for a batch.
      others: more settings, as they are.
      stored: the teacher's outputs that were computed before, and the transfer set.
      task_loss: what takes the place of the cross-entropy, or None.
      sample_labels: shapes of a batch's labels, for that.
    """

    metrics: Sequence[Any]
    coefs: Sequence[Any]
    task_coef: Any
    teacher: Any
    data: Any
    optimizer: optax.GradientTransformation | None
    params: Any
    outputs: Callable[[], tuple[Any, Any]]
    others: dict[str, Any]
    stored: Any = None
    task_loss: Callable | None = None
    sample_labels: Any = None

    def described(self) -> dict[str, Any]:
        """Describe it by values, as JSON: two spellings of one setting are one.

        Functions (optimizers, schedules, metrics of one's own) are described by what they compute.
        """
        resolved = [resolve(metric) for metric in self.metrics]
        found = self.others | {
            "metric": [_names(metric) for metric in resolved],
            "coef": [None if callable(c) else _weight(c) for c in self.coefs],
            "task_coef": None if callable(self.task_coef) else _weight(self.task_coef),
            "optimizer": "default" if self.optimizer is None else "given",
        }
        for number, metric in enumerate(resolved, 1):
            whose = "" if len(resolved) == 1 else f"student {number}: "
            options = _options(metric, self.outputs)
            found |= {f"{whose}{name}": value for name, value in options.items()}
        for name, weights in (("coef", self.coefs), ("task_coef", [self.task_coef])):
            traced = [_traced(w, jnp.zeros((), jnp.int32)) for w in weights if callable(w)]
            if traced:
                found[f"{name} {_VERSIONS}"] = traced
        if self.optimizer is not None:
            found[f"optimizer {_VERSIONS}"] = _update(self.optimizer, self.params)
        found["task_loss"] = "cross-entropy" if self.task_loss is None else _name(self.task_loss)
        if self.task_loss is not None:
            out = self.outputs()[0]
            found[f"task_loss {_VERSIONS}"] = _traced(self.task_loss, out, self.sample_labels)
        if self.teacher is not None:
            found["teacher"] = _digest(self.teacher)
        found["data"] = "an iterable" if self.data is None else _digest(self.data)
        found["stored outputs and transfer set"] = _digest(self.stored)
        return json.loads(json.dumps(found))


def check_same(old: dict, new: dict, folder) -> None:
    """CheckpointError for settings that a resumed run may not change.

    A key that an old record lacks is not compared: the code that wrote it did not know it. But of
    the solvers it knew which one it took where nothing was said.
    """
    old = dict(old)
    if "metric" in old:  # before November 2026 as it was spelled, with some of its options
        old |= {key: "sinkhorn" for key in new if key not in old and _took_sinkhorn(key, old)}
        old["metric"] = [_plain(name) for name in old["metric"]]
    if "coef" in old:
        old["coef"] = [None if c is None else _weight(c) for c in old["coef"]]
    changed = [f"{k} {old[k]} -> {new[k]}" for k in new if k in old and old[k] != new[k]]
    if changed:
        raise CheckpointError(
            f"the checkpoint in {folder} was made with other settings ({', '.join(changed)}): "
            "resume with its own, or use another folder"
        )


def _took_sinkhorn(key: str, old: dict) -> bool:
    """Tell whether a key of today is the solver of a term of an old record that named none."""
    place = re.fullmatch(r"(?:student (\d+): )?(?:term (\d+), )?(w2|cw2|jw2)(?:@\w+)? solver", key)
    if place is None or any(k.endswith(" solver") for k in old):
        return False
    student, term, name = place.groups()
    spelled_terms = [terms(spelled(metric)) for metric in old["metric"]]
    with contextlib.suppress(IndexError):
        written = spelled_terms[int(student or 1) - 1][int(term or 1) - 1]
        return re.split("[:@]", written)[0] == name and "solver=" not in written
    return False


def _weight(coef: float | str) -> float | str:
    return f"auto:{auto_ratio(coef):g}" if isinstance(coef, str) else float(coef)


def _plain(name: str) -> str:
    """Return a metric's name without options: "jw2:beta=0.5+kd" is jw2+kd."""
    return "+".join(term.partition(":")[0] for term in terms(spelled(name)))


def _names(metric: Any) -> str:
    """Return the names of a metric's terms."""
    if isinstance(metric, MetricSum):
        return "+".join(term.label for term in metric.metrics)
    return "none" if metric is None else _name(metric)


def _name(function: Any) -> str:
    label = getattr(function, "label", None)
    return str(label or getattr(function, "__name__", type(function).__name__)).replace("_", "-")


def _options(metric: Any, outputs: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """Return a metric's options, defaults too, and a sum's weights, each named after its term."""
    if metric is None:
        return {}
    if isinstance(metric, MetricSum):
        found: dict[str, Any] = {"weights": list(metric.weights)}
        for number, term in enumerate(metric.metrics, 1):
            found |= {f"term {number}, {k}": v for k, v in _options(term, outputs).items()}
        return found
    if not isinstance(metric, Metric):
        student, teacher = outputs()
        labels = jnp.zeros(jax.tree.leaves(student)[0].shape[0], jnp.int32)
        more = {"labels_t": labels, "key": jax.random.key(0)}
        call = lambda s, t: compared(metric, s, t, labels, **more)  # noqa: E731
        return {f"{_names(metric)} {_VERSIONS}": _traced(call, student, teacher)}
    given = dict(metric.options)
    return {
        f"{metric.label} {p.name}": _value(given.get(p.name, p.default))
        for p in inspect.signature(METRICS[metric.name].function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in PER_CALL
    }


def _value(option: Any) -> Any:
    array = getattr(option, "array", None)  # of a traced option, say costs between classes
    return option if array is None else _digest(array)


def _traced(function: Callable, *arguments: Any) -> str | None:
    """Hash what a function computes for arguments of these shapes; None if it cannot be traced."""
    try:
        program = jax.make_jaxpr(function)(*arguments)
    except Exception:  # the caller's own error, which appears when the function runs
        return None
    text = re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr))  # addresses, another in each process
    return hashlib.sha256((text + _digest(list(program.consts))).encode()).hexdigest()[:16]


def _update(optimizer: optax.GradientTransformation, params: Any) -> str | None:
    """Hash what an optimizer does with gradients, parameters and the loss."""
    update = optax.with_extra_args_support(optimizer).update
    state = jax.eval_shape(optimizer.init, params)

    def call(grads, state, params, loss):
        return update(
            grads, state, params, value=loss, grad=grads, value_fn=lambda params: loss + 0 * loss
        )

    return _traced(call, params, state, params, jnp.zeros(()))


def _digest(tree: Any) -> str:
    """Hash the values of arrays, with their places, shapes and dtypes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{place} {array.dtype}{list(array.shape)}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]
