"""Evaluation, of a batch and of a test set, which arrays or an iterable hold."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import DEVICES, Apply, Network
from kd2m_jax.losses._checks import integer_labels
from kd2m_jax.losses._metrics import as_outputs
from kd2m_jax.training._body import Batch, TaskLoss, own_task
from kd2m_jax.training._examples import check_memory, checked, examples, has_labels
from kd2m_jax.training._labels import are_class_numbers
from kd2m_jax.training._preprocess import Prepare
from kd2m_jax.training._processes import every_row, summed
from kd2m_jax.training._programs import shared
from kd2m_jax.training._scores import Score, scored
from kd2m_jax.training._streams import (
    are_arrays,
    first_batch,
    is_map_dataset,
    length,
    read_epoch,
)


def make_eval_step(network: Network) -> Callable[..., dict[str, jax.Array]]:
    """Compile the evaluation of one batch, as sums: add them up, then divide.

    Args:
      network: any `Network`; it runs in evaluation mode.

    Returns:
      ``eval_step(variables, (x, labels)) -> sums`` with ``correct``, ``loss`` (cross-entropy in
      nats) and ``count``. Examples with a negative label do not count, so a last partial batch
      is padded with label -1 and nothing is compiled again.

    Raises:
      Exception: what the network raises for such an ``x`` ``[n, ...]``; labels are ``[n]``
        integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import from_nnx, models
      >>> network = from_nnx(models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0)))
      >>> x = jnp.ones((4, 4))
      >>> sums = make_eval_step(network)(network.init(None, x), (x, jnp.array([0, 1, 2, -1])))
      >>> print(sums["correct"], sums["count"])
      1 3
    """
    program = jax.jit(functools.partial(evaluation_sums, network.apply))

    def eval_step(variables, batch):
        x, labels = batch
        return program(variables, (x, integer_labels(labels)))

    return eval_step


def evaluation_sums(apply: Apply, variables: Any, batch: Any) -> dict[str, jax.Array]:
    """Return what `make_eval_step` adds up for a batch."""
    (params, state), (x, labels) = variables, batch
    out, _ = apply(params, state, x, train=False, rng=None)
    return _sums(out, labels)


def _sums(out: Any, labels: jax.Array) -> dict[str, jax.Array]:
    counted = labels >= 0
    logits = jnp.asarray(out.logits, jnp.promote_types(jnp.asarray(out.logits).dtype, jnp.float32))
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(counted, labels, 0)
    )
    return {
        "correct": jnp.sum(counted & (jnp.argmax(logits, axis=-1) == labels)),
        "loss": jnp.sum(jnp.where(counted, losses, 0)),
        "count": jnp.sum(counted),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked of a student on ``eval_data``.

    Attributes:
      classes: how many the networks tell apart; None where labels are the caller's business.
      task_loss: what takes the place of the cross-entropy, or None.
      scores: further ones, by their keys in the records.
      teacher: its network, or None.
      teacher_variables: the network's.
    """

    classes: int | None
    task_loss: TaskLoss | None = None
    scores: dict[str, Score] = dataclasses.field(default_factory=dict)
    teacher: Network | None = None
    teacher_variables: Any = None

    @property
    def any_labels(self) -> bool:
        """Whether labels are what the task loss takes."""
        return self.task_loss is not None

    @property
    def compares(self) -> bool:
        """Whether a score needs the teacher's outputs."""
        return "agreement" in self.scores.values()

    @property
    def keeps(self) -> tuple[str, ...]:
        """Which of the outputs are kept until all batches are through."""
        own = any(callable(score) for score in self.scores.values())
        return Outputs._fields if own else ("logits",) if self.scores else ()


class TestSet:
    """Batches of ``eval_data`` on the devices: arrays stay there, an iterable is read each time.

    ValueError or TypeError for anything but what ``data`` of `fit` may be, with labels.
    """

    def __init__(self, data: Any, mesh: Mesh, task: Task):
        self._data, self._task, self._devices = data, task, mesh.size
        self._split = NamedSharding(mesh, PartitionSpec(DEVICES))
        in_memory = are_arrays(data)
        if in_memory:
            check_memory("eval_data", data, mesh.devices.flat[0])
            first = examples("eval_data", data, task.classes, any_labels=task.any_labels)
        else:
            if length(data) is None and hasattr(data, "__len__") and is_map_dataset(data):
                raise ValueError("eval_data never ends: leave out its repeat()")
            first, _ = first_batch("eval_data", data, any_labels=task.any_labels)
        self._check("eval_data", first)
        if in_memory and not task.any_labels and not has_labels(first.labels):
            raise ValueError("eval_data has no label")
        # One shape for all batches, split over the devices; the last one is filled up.
        count = len(range(jax.process_index(), len(first.labels), jax.process_count()))
        self._size = -(-(min(count, 500) if in_memory else count) // mesh.size) * mesh.size
        self._placed = list(self._cut(first)) if in_memory else None

    def _check(self, name: str, batch: Batch) -> None:
        """Raise ValueError for labels or outputs that the scores cannot use."""
        task = self._task
        of_classes = [s for s in task.scores.values() if s in ("accuracy", "top-5", "ece")]
        if (of_classes or not task.any_labels) and not are_class_numbers(batch.labels):
            raise ValueError(f"{name} needs class numbers [n] as labels, -1 where there is none")
        if not task.compares or task.teacher is not None:
            return
        if batch.teacher is None or batch.teacher.logits is None:
            raise ValueError(
                f"agreement compares with the teacher's logits on {name}: with a network as the "
                "teacher, or with eval_data that brings its outputs, as (x, labels, outputs)"
            )

    def __iter__(self) -> Iterator[tuple[Batch, jax.Array]]:
        """Give batches and which of their rows are no filling."""
        if self._placed is not None:
            yield from self._placed
            return
        task = self._task
        with contextlib.closing(read_epoch("eval_data", self._data)) as read:
            for name, batch in read:
                found = checked(name, batch, task.classes, any_labels=task.any_labels)
                self._check(name, found)
                yield from self._cut(found)

    def _cut(self, batch: Batch) -> Iterator[tuple[Batch, jax.Array]]:
        """Cut this process's rows into batches of one size, on the devices."""
        labels = batch.labels
        if not self._task.any_labels:
            labels = jnp.asarray(labels, jnp.int32)
        teacher = batch.teacher if self._task.compares and self._task.teacher is None else None
        rows = slice(jax.process_index(), None, jax.process_count())
        own = jax.tree.map(lambda a: a[rows], Batch(batch.x, labels, teacher))
        count = len(own.labels)
        for start in range(0, max(count, 1), self._size):
            part = jax.tree.map(lambda a, start=start: a[start : start + self._size], own)
            part = part._replace(
                labels=self._filled(part.labels, 0 if self._task.any_labels else -1)
            )
            yield (
                jax.tree.map(self._filled, part),
                self._filled(np.ones(min(self._size, count - start), bool)),
            )

    def _filled(self, array: Any, fill: int = 0) -> jax.Array:
        array = jnp.asarray(array)
        missing = [(0, self._size - len(array)), *[(0, 0)] * (array.ndim - 1)]
        if missing[0][1]:
            array = jnp.pad(array, missing, constant_values=fill)
        return jax.device_put(array, self._split)


def evaluators(networks: list[Network], data: Any, prepare: Prepare, mesh: Mesh, task: Task):
    """Return a function of variables for each network: its scores over all examples, or none.

    ValueError or TypeError for data that is not what it should be.
    """
    if data is None:
        return [lambda variables: {}] * len(networks)
    test_set = TestSet(data, mesh, task)
    teacher = task.teacher.apply if task.compares and task.teacher is not None else None
    return [
        functools.partial(
            _evaluate,
            shared(_program, network.apply, prepare, task.task_loss, teacher, task.keeps),
            test_set,
            task,
        )
        for network in networks
    ]


def _evaluate(program: Callable, test_set: TestSet, task: Task, variables: Any) -> dict[str, float]:
    """Return a student's scores over all examples."""
    teacher_variables = task.teacher_variables if task.compares else None
    parts, kept, sums = [], [], {}
    for batch, real in test_set:
        parts.append(program(variables, teacher_variables, batch, real))
        if len(parts) > 1:  # what a batch gave is read while the next one runs
            _take(parts.pop(0), sums, kept)
    _take(parts.pop(), sums, kept)
    sums = summed(sums)
    if not sums["count"]:
        raise ValueError("eval_data has no label")
    found = {"test_loss": sums["loss"] / sums["count"]}
    if "correct" in sums:
        found["test_accuracy"] = sums["correct"] / sums["count"]
    if kept:
        student, teacher, labels = every_row(jax.tree.map(lambda *a: np.concatenate(a), *kept))
        found |= scored(task.scores, student, teacher, labels)
    return found


def _take(part: tuple, sums: dict[str, float], kept: list) -> None:
    """Add a batch's sums up, and keep those of its rows that are no filling."""
    for name, value in part[0].items():
        sums[name] = sums.get(name, 0) + float(value)
    if part[1] is not None:
        *rows, real = jax.tree.map(np.asarray, part[1])
        kept.append(jax.tree.map(lambda a: a[real], tuple(rows)))


def _program(
    apply: Apply,
    prepare: Prepare,
    task_loss: TaskLoss | None,
    teacher: Apply | None,
    keeps: tuple[str, ...],
):
    @jax.jit
    def program(variables, teacher_variables, batch, real):
        x, labels = batch.x, batch.labels
        x, changed = prepare(x, labels, None)
        if task_loss is not None:  # in training it sees them as they come from there
            labels = changed
        params, state = variables
        out, _ = apply(params, state, x, train=False, rng=None)
        if task_loss is None:
            sums = _sums(out, labels)
        else:
            sums = _own_sums(task_loss, as_outputs("student", out), labels, real)
        if not keeps:
            return sums, None
        seen = batch.teacher
        if teacher is not None:
            params, state = teacher_variables
            seen, _ = teacher(params, state, x, train=False, rng=None)
        seen = None if seen is None else as_outputs("teacher", seen)
        dropped = {name: None for name in Outputs._fields if name not in keeps}
        own = as_outputs("student", out)._replace(**dropped)
        return sums, (own, None if seen is None else Outputs(None, seen.logits), labels, real)  # pyright: ignore

    return program


def _own_sums(task_loss: TaskLoss, out: Outputs, labels: jax.Array, real: jax.Array):
    """Add a caller's loss up, of each row as a batch of one: rows of filling stay out."""

    def of_one(row):
        return own_task(task_loss, *jax.tree.map(lambda a: a[None], row))

    losses = jax.vmap(of_one)((out, labels))
    return {"loss": jnp.sum(jnp.where(real, losses, 0)), "count": jnp.sum(real)}
