"""What every kind of step runs: student and teacher forward, both losses, the update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Apply, Network, Tree
from kd2m_jax.callbacks import WeightAverage
from kd2m_jax.losses import Metric, MetricSum
from kd2m_jax.losses._metrics import as_outputs
from kd2m_jax.losses._objective import (
    LossTerms,
    classes_of,
    cross_entropy,
    distance,
    student_logits,
)
from kd2m_jax.losses._resolve import AnyMetric, resolve
from kd2m_jax.teachers import EmaTeacher, Memory
from kd2m_jax.training._auto_coef import auto_ratio, balanced_gradients
from kd2m_jax.training._averages import averaged, like
from kd2m_jax.training._labels import (
    Unlabelled,
    are_class_numbers,
    check_rule,
    classes_for,
    needs_labels,
)

# A weight, or an optax schedule of the step number.
Coef: TypeAlias = float | Callable[[jax.Array], ArrayLike]
# (Outputs, labels) -> a scalar or [n], in the place of the cross-entropy.
TaskLoss: TypeAlias = Callable[[Outputs, jax.Array], ArrayLike]


class Batch(NamedTuple):
    """What one step sees, or arrays from which it takes that.

    Attributes:
      x: inputs, an array or a pytree of arrays with one row per example.
      labels: ``[n]`` integers, -1 for none, or ``[n, k]`` distributions, or what a task of the
        caller's own takes.
      teacher: `Outputs` of the teacher, computed before, for the rows that the metric compares.
      transfer: more inputs: where there are any, the metric compares these rows, which have no
        labels, and only the cross-entropy looks at ``x``.
    """

    x: Tree
    labels: Any
    teacher: Outputs | None = None
    transfer: Tree = None


class TrainState(NamedTuple):
    """Everything that a step reads and replaces. A pytree.

    Attributes:
      params: the student's parameters.
      model_state: the student's own state (batch statistics).
      opt_state: the optimizer's state.
      grad_norms: ``[2]`` float32, exponential means of the norms of the task's and the distance's
        gradients, which coef="auto" keeps (zeros without it).
      step: int32 scalar, steps done.
      key: PRNG key; each step folds its number into it.
      average: the moving average of both variables, of a student that is its own teacher
        (`ema_teacher`) or with a `WeightAverage`; else None.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from kd2m_jax import from_nnx, init_state, models
      >>> network = from_nnx(models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0)))
      >>> state = init_state(network, optax.sgd(0.1), jnp.ones((2, 4)), key=jax.random.key(0))
      >>> params, model_state = state.variables
      >>> state.step.shape, state.grad_norms.shape
      ((), (2,))
    """

    params: Tree
    model_state: Tree
    opt_state: Tree
    grad_norms: jax.Array
    step: jax.Array
    key: jax.Array
    average: Tree = None

    @property
    def variables(self) -> tuple[Tree, Tree]:
        """``(params, model_state)``, what evaluation and a later student need of a teacher."""
        return self.params, self.model_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a student minimises: ``task_coef * cross-entropy + coef * metric``, checked.

    Attributes:
      metric: the distance to the teacher, or None.
      coef: lambda: a number or a schedule; 0 where ``ratio`` decides.
      task_coef: the weight of the cross-entropy: a number or a schedule.
      ratio: RATIO of coef="auto:RATIO", or None.
      unlabelled: the class that a conditional metric takes where there is no label.
      task_loss: what takes the place of the cross-entropy, or None.
    """

    metric: Metric | MetricSum | Callable | None
    coef: Coef
    task_coef: Coef
    ratio: float | None = None
    unlabelled: Unlabelled = None
    task_loss: TaskLoss | None = None


def objective(
    metric: AnyMetric,
    coef: Coef | str,
    task_coef: Coef,
    unlabelled: Unlabelled,
    task_loss: TaskLoss | None = None,
) -> Objective:
    """Check what a student is to minimise; ValueError or TypeError for what cannot be."""
    if task_loss is not None and not callable(task_loss):
        raise TypeError(f"task_loss must be a function (Outputs, labels), got {task_loss!r}")
    found, ratio = resolve(metric), None
    unlabelled = check_rule(unlabelled)
    if isinstance(coef, str):
        ratio, coef = auto_ratio(coef), 0.0
        if not callable(task_coef) and task_coef == 0:
            raise ValueError("coef='auto' follows the cross-entropy's gradient: task_coef is 0")
    for name, weight in (("coef", coef), ("task_coef", task_coef)):
        if callable(weight):
            continue
        if weight is None or isinstance(weight, str) or np.shape(weight) != ():
            raise ValueError(f"{name} must be a number >= 0 or a schedule, got {weight!r}")
        if not weight >= 0:
            raise ValueError(f"{name} must be >= 0, got {weight}")
    return Objective(
        metric=found,
        coef=coef,
        task_coef=task_coef,
        ratio=ratio,
        unlabelled=unlabelled,
        task_loss=task_loss,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """The parts of a step: on one device, or on each device of a named axis.

    On several devices each sees its part of the batch, and features, logits and labels are
    gathered first: a distance between distributions is not the mean of the shards' distances.
    Every device then differentiates the same global loss through its own part. The gathering's
    transpose adds the devices' equal gradients up, and the mean over devices takes that factor
    out again.
    """

    student: Apply
    teacher: Apply | None
    update: optax.TransformUpdateExtraArgsFn
    objective: Objective
    axis: str | None
    all_labelled: bool = False
    average: EmaTeacher | WeightAverage | None = None  # of the student, which that keeps
    remembers: bool = False  # whether the teacher is gone, and its variables are a Memory
    rows: int | None = None  # how many rows of a bank a step draws, if not as many as the batch has

    def gather(self, tree):
        """Return the global batch: every device's part, in order."""
        return tree if self.axis is None else jax.lax.all_gather(tree, self.axis, tiled=True)

    def mean(self, tree):
        """Average what is floating point over the devices; counters and keys are equal there."""
        if self.axis is None:
            return tree
        floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: jax.lax.pmean(x, self.axis) if floating(x) else x, tree)

    def __call__(self, state: TrainState, teacher_variables, batch):
        """Run one step: ``(state, teacher_variables, a Batch) -> (state, metrics)``."""
        objective = self.objective
        weights: list[Any] = [
            w(state.step) if callable(w) else w for w in (objective.coef, objective.task_coef)
        ]
        loss_fn = self._loss(state, teacher_variables, Batch(*batch), weights)
        norms = state.grad_norms
        if objective.ratio is None:
            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            grads = self.mean(grads)
        else:
            loss, aux, grads, weights[0], norms = balanced_gradients(
                loss_fn,
                self.mean,
                state.params,
                norms,
                ratio=objective.ratio,
                task_coef=weights[1],
            )
        terms, accuracy, model_state = aux
        # Line searches and schedules that follow the loss take it; other optimizers do not look.
        updates, opt_state = self.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad=grads,
            value_fn=lambda params: loss_fn(params)[0],
        )
        metrics = {
            "loss": loss,
            "task_loss": terms.task,
            "distillation_loss": terms.distillation,
            "coef": jnp.asarray(weights[0], jnp.float32),
            **({} if accuracy is None else {"accuracy": accuracy}),
            **{f"distillation_loss/{name}": value for name, value in terms.parts.items()},
        }
        params = optax.apply_updates(state.params, updates)
        model_state = like(self.mean(model_state), state.model_state)
        average = state.average
        if self.average is not None:
            kept = self.average.kept(state.step)
            average = averaged(average, (params, model_state), kept)
        state = TrainState(
            params, model_state, opt_state, norms, state.step + 1, state.key, average
        )
        return state, self.mean(metrics)

    def _loss(self, state: TrainState, teacher_variables, batch: Batch, weights):
        """Return ``params -> (loss, (terms, accuracy, model_state))`` for this batch."""
        dropout_key, metric_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        if self.axis is not None:
            dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(self.axis))
        x, labels = batch.x, self.gather(batch.labels)
        if isinstance(self.average, EmaTeacher):
            teacher_variables = averaged_variables(state)
        if self.remembers:
            memory: Any = teacher_variables
            recall = functools.partial(self._recall, memory, metric_key)
        else:
            seen_by_teacher = self._seen_by_teacher(teacher_variables, batch)
            recall = lambda n: (seen_by_teacher, None)  # noqa: E731
        if batch.transfer is not None:
            # One forward pass, so that batch statistics are those of both.
            x = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x, batch.transfer)

        def loss_fn(params):
            out, model_state = self.student(
                params, state.model_state, x, train=True, rng=dropout_key
            )
            out, compared, classes = self._parts(out, batch, labels)
            task, accuracy = self._task(out, labels, weights[1])
            seen, labels_t = recall(len(compared.features))
            if not self.all_labelled or batch.transfer is not None:
                classes = self._classes(compared, seen, classes)
            distillation, parts = self._distance(compared, seen, classes, metric_key, labels_t)
            terms = LossTerms(task, distillation, parts)
            loss = jnp.asarray(weights[1]) * terms.task + jnp.asarray(weights[0]) * distillation
            return loss, (terms, accuracy, model_state)

        return loss_fn

    def _task(self, out: Outputs, labels: jax.Array, weight: Any) -> tuple[jax.Array, Any]:
        """Return what the labels' part of the loss is, and the accuracy or None."""
        if self.objective.task_loss is not None:
            return own_task(self.objective.task_loss, out, labels), None
        logits = student_logits(out, weight)
        task = cross_entropy(logits, labels, all_labelled=self.all_labelled)
        return task, _accuracy(out, labels)

    def _seen_by_teacher(self, teacher_variables, batch: Batch) -> Outputs | None:
        """Return the teacher's outputs for the rows that the metric compares, of all devices."""
        if self.teacher is None:
            seen = None if batch.teacher is None else as_outputs("teacher", batch.teacher)
        else:
            params, state = teacher_variables
            x = batch.x if batch.transfer is None else batch.transfer
            seen, _ = self.teacher(params, state, x, train=False, rng=None)
        return self.gather(jax.lax.stop_gradient(seen))

    def _parts(self, out: Any, batch: Batch, labels: jax.Array) -> tuple[Outputs, Outputs, Any]:
        """Split the student's outputs: rows with labels, rows to compare, and their classes."""
        out = as_outputs("student", out)
        if batch.transfer is None:
            out = self.gather(out)
            known = self.objective.task_loss is None or are_class_numbers(labels)
            return out, out, classes_of(labels) if known else jnp.full(len(labels), -1)
        n = len(batch.labels)
        out, compared = (
            self.gather(jax.tree.map(lambda a, rows=rows: a[rows], out))
            for rows in (slice(n), slice(n, None))
        )
        return out, compared, jnp.full(len(compared.features), -1)

    def _recall(self, memory: Memory, key: jax.Array, n: int) -> tuple[Any, Any]:
        """Return what a teacher that is gone has left, for a batch of n, and its classes."""
        ours = isinstance(self.objective.metric, Metric | MetricSum)
        if memory.statistics is not None and ours:  # which draw rows themselves where they need any
            return memory.statistics, None
        return memory.draw(jax.random.fold_in(key, 2**32 - 1), self.rows or n)

    def _classes(self, student: Outputs, teacher: Any, classes: jax.Array) -> jax.Array:
        """Give rows without a label a class, if the metric reads any."""
        if not needs_labels(self.objective.metric):
            return classes
        same = None if self.remembers else teacher  # has the teacher seen these images?
        return classes_for(self.objective.unlabelled, classes, student, same)

    def _distance(self, student: Outputs, teacher: Any, classes: jax.Array, key, labels_t=None):
        """Return the metric's value and, of a sum of metrics, its parts."""
        metric = self.objective.metric
        if metric is not None and teacher is None:
            raise ValueError(
                f"metric {getattr(metric, 'label', metric)!r} compares with a teacher, and there "
                "is none"
            )
        teacher = student if teacher is None else teacher
        apart = {"labels_t": labels_t} if self.remembers else {}
        return distance(student, teacher, classes, metric, key=key, **apart)


def step_body(
    student: Network,
    teacher: Network | None,
    optimizer: optax.GradientTransformation,
    *,
    metric: AnyMetric,
    coef: Coef | str,
    task_coef: Coef,
    unlabelled: Unlabelled = None,
    task_loss: TaskLoss | None = None,
    axis: str | None,
    all_labelled: bool = False,
    average: EmaTeacher | WeightAverage | None = None,
    remembers: bool = False,
    rows: int | None = None,
) -> Body:
    """Make what every kind of step runs, on one device or on each device of a named axis.

    ``all_labelled`` says that no label is -1; an ``average`` is kept of the student, and may be
    its teacher. A step that ``remembers`` has the `Memory` of a bank or of statistics for the
    teacher's variables.
    """
    if isinstance(average, EmaTeacher):
        teacher = student
    for network in (student, teacher):
        if network is not None and not isinstance(network, Network):
            raise TypeError(
                "a step takes networks (from_nnx, from_linen) for student and teacher, got "
                f"{type(network).__name__}: a Bank, class statistics, stored Outputs and "
                "ema_teacher are teachers of fit"
            )
    return Body(
        student.apply,
        None if teacher is None else teacher.apply,
        optax.with_extra_args_support(optimizer).update,
        objective(metric, coef, task_coef, unlabelled, task_loss),
        axis,
        all_labelled,
        average,
        remembers,
        rows,
    )


def own_task(task_loss: TaskLoss, out: Outputs, labels: jax.Array) -> jax.Array:
    """Return a caller's loss as a scalar: the mean, where it has a value for each row."""
    loss = jnp.asarray(task_loss(out, labels))
    if loss.ndim > 1:
        raise ValueError(
            f"task_loss must return a scalar or a value for each row, got shape {list(loss.shape)}"
        )
    return jnp.mean(loss.astype(jnp.promote_types(loss.dtype, jnp.float32)))


def averaged_variables(state: TrainState) -> tuple[Tree, Tree]:
    """Return ``(params, model_state)`` of the student's average, in the dtypes of its own."""
    return jax.tree.map(lambda a, like: a.astype(like.dtype), state.average, state.variables)


def _accuracy(out: Outputs, labels: jax.Array) -> jax.Array:
    """Return the share of the labelled rows that are right; NaN without any."""
    labels = classes_of(labels)
    right = jnp.argmax(jnp.asarray(out.logits), axis=-1) == labels
    return jnp.sum(right, dtype=jnp.float32) / jnp.sum(labels != -1)
