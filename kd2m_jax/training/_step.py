"""Algorithm 1 as one XLA program: student and teacher forward, both losses, the update."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from kd2m_jax.adapters import Apply, Network, Tree
from kd2m_jax.losses import Metric, MetricSum, distillation_loss
from kd2m_jax.losses._checks import integer_labels
from kd2m_jax.losses._metrics import resolve
from kd2m_jax.outputs import Outputs
from kd2m_jax.training._auto_coef import auto_ratio, balanced_gradients
from kd2m_jax.training._programs import shared

# A weight, or an optax schedule of the step number.
Coef: TypeAlias = float | Callable[[jax.Array], ArrayLike]


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

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from kd2m_jax import from_nnx, models
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

    @property
    def variables(self) -> tuple[Tree, Tree]:
        """``(params, model_state)``, what evaluation and a later student need of a teacher."""
        return self.params, self.model_state


class Step(Protocol):
    """One training step: ``(state, teacher_variables, (x, labels)) -> (state, metrics)``."""

    def __call__(
        self, state: TrainState, teacher_variables: Tree, batch: tuple[Tree, ArrayLike], /
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Return the new state, and the scalars of this step."""
        ...


# As one program each, which JAX keeps by the shapes: every leaf gets a buffer of its own, so that
# a step may donate them all.
owned = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def init_state(
    network: Network, optimizer: optax.GradientTransformation, x: ArrayLike, *, key: jax.Array
) -> TrainState:
    """Make the state before the first step.

    Args:
      network: the student.
      optimizer: an optax optimizer.
      x: a batch of inputs ``[n, ...]``, of which only shape and dtype count.
      key: a PRNG key: for initialisation, dropout, and metrics that draw.

    Returns:
      A `TrainState` that owns its arrays: a step may donate them without harm to the network.

    Raises:
      Whatever the network's ``init`` raises for such an ``x``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from kd2m_jax import from_nnx, models
      >>> network = from_nnx(models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0)))
      >>> state = init_state(network, optax.sgd(0.1), jnp.ones((2, 4)), key=jax.random.key(0))
      >>> print(state.step)
      0
    """
    init_key, key = jax.random.split(key)
    params, model_state = network.init(init_key, jax.tree.map(jnp.asarray, x))
    return owned(shared(_beginning, optimizer.init)(params, model_state, key))


def _beginning(init: optax.TransformInitFn):
    """Make a state from a network's variables in one program, instead of one per parameter."""

    @jax.jit
    def beginning(params, model_state, key):
        norms, step = jnp.zeros(2, jnp.float32), jnp.zeros((), jnp.int32)
        return TrainState(params, model_state, init(params), norms, step, key)

    return beginning


def make_train_step(
    student: Network,
    teacher: Network | None,
    optimizer: optax.GradientTransformation,
    *,
    metric: Metric | MetricSum | str | None,
    coef: Coef | str = 1.0,
    task_coef: Coef = 1.0,
) -> Step:
    """One training step on one device, compiled as one program.

    ``loss = task_coef * cross-entropy(labels, student) + coef * metric(student, teacher)``. The
    teacher runs in evaluation mode on the same batch; its variables are an argument that is
    neither differentiated nor donated nor updated.

    Args:
      student: the network to train.
      teacher: the frozen network, or None to train without one (metric None).
      optimizer: an optax optimizer of the student's parameters.
      metric: a name from ``losses.METRICS``, a `losses.Metric`, or None for cross-entropy alone.
      coef: >= 0, lambda: a number, an optax schedule of the step number, or "auto:RATIO". That
        keeps the norm of lambda's part of the gradient at RATIO times that of the cross-entropy's
        part, both with respect to all of the student's parameters (a projector's too): the one
        place that both reach in any network. The norms are exponential means over about five
        steps: lambda follows the training smoothly and lags where a norm changes within so few.
        It costs one more backward pass.
        "auto" alone is "auto:0.1".
      task_coef: >= 0, a number or a schedule.

    Returns:
      ``step(state, teacher_variables, (x, labels)) -> (state, metrics)``: x ``[n, ...]``, labels
      ``[n]`` integers; teacher_variables are ``(params, state)`` as the teacher's ``init`` or a
      trained ``TrainState.variables`` gives them (None without a teacher). The old state is
      donated. ``metrics`` has the float32 scalars ``loss``, ``task_loss`` (nats),
      ``distillation_loss`` (the metric's unit), ``coef`` and ``accuracy`` in [0, 1], and for a
      sum of metrics ``distillation_loss/NAME`` for each.

    Raises:
      ValueError: a negative weight or one that cannot be read, an unknown metric, or a metric
        without a teacher.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from kd2m_jax import from_nnx, models
      >>> teacher, student = (
      ...     from_nnx(models.MLP((w, 8), 3, in_features=4, rngs=nnx.Rngs(w))) for w in (32, 8))
      >>> x, labels = jax.random.normal(jax.random.key(1), (12, 4)), jnp.arange(12) % 3
      >>> optimizer = optax.sgd(0.1)
      >>> step = make_train_step(student, teacher, optimizer, metric="gaussian-w2", coef=0.1)
      >>> state = init_state(student, optimizer, x, key=jax.random.key(0))
      >>> state, metrics = step(state, teacher.init(None, x), (x, labels))
      >>> print(state.step, sorted(metrics))
      1 ['accuracy', 'coef', 'distillation_loss', 'loss', 'task_loss']

    References:
      Fernandes Montesuma, KD2M, GSI 2025, Algorithm 1.
    """
    body = step_body(
        student, teacher, optimizer, metric=metric, coef=coef, task_coef=task_coef, axis=None
    )
    return apart(jax.jit(body, donate_argnums=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a student minimises: ``task_coef * cross-entropy + coef * metric``, checked.

    Attributes:
      metric: the distance to the teacher, or None.
      coef: lambda: a number or a schedule; 0 where ``ratio`` decides.
      task_coef: the weight of the cross-entropy: a number or a schedule.
      ratio: RATIO of coef="auto:RATIO", or None.
    """

    metric: Metric | MetricSum | None
    coef: Coef
    task_coef: Coef
    ratio: float | None = None


def objective(
    metric: Metric | MetricSum | str | None, coef: Coef | str, task_coef: Coef, *, has_teacher: bool
) -> Objective:
    """Check what a student is to minimise; ValueError for what cannot be."""
    metric, ratio = resolve(metric), None
    if metric is not None and not has_teacher:
        raise ValueError(f"metric {metric.label!r} compares with a teacher, and there is none")
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
    return Objective(metric=metric, coef=coef, task_coef=task_coef, ratio=ratio)


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
        """Run one step: ``(state, teacher_variables, (x, labels)) -> (state, metrics)``."""
        objective = self.objective
        weights: list[Any] = [
            w(state.step) if callable(w) else w for w in (objective.coef, objective.task_coef)
        ]
        loss_fn = self._loss(state, teacher_variables, batch, weights)
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
            "accuracy": accuracy,
            **{f"distillation_loss/{name}": value for name, value in terms.parts.items()},
        }
        params = optax.apply_updates(state.params, updates)
        model_state = _like(self.mean(model_state), state.model_state)
        state = TrainState(params, model_state, opt_state, norms, state.step + 1, state.key)
        return state, self.mean(metrics)

    def _loss(self, state: TrainState, teacher_variables, batch, weights):
        """Return ``params -> (loss, (terms, accuracy, model_state))`` for this batch."""
        x, labels = batch
        dropout_key, metric_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        if self.axis is not None:
            dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(self.axis))
        seen_by_teacher = None
        if self.teacher is not None:
            params, teacher_state = teacher_variables
            seen_by_teacher, _ = self.teacher(params, teacher_state, x, train=False, rng=None)
            seen_by_teacher = self.gather(jax.lax.stop_gradient(seen_by_teacher))
        all_labels = self.gather(labels)

        def loss_fn(params):
            out, model_state = self.student(
                params, state.model_state, x, train=True, rng=dropout_key
            )
            out = self.gather(out)
            loss, terms = distillation_loss(
                out,
                out if seen_by_teacher is None else seen_by_teacher,
                all_labels,
                metric=self.objective.metric,
                coef=weights[0],
                task_coef=weights[1],
                key=metric_key,
            )
            return loss, (terms, _accuracy(out, all_labels), model_state)

        return loss_fn


def step_body(
    student: Network,
    teacher: Network | None,
    optimizer: optax.GradientTransformation,
    *,
    metric: Metric | MetricSum | str | None,
    coef: Coef | str,
    task_coef: Coef,
    axis: str | None,
) -> Body:
    """Make what every kind of step runs, on one device or on each device of a named axis."""
    return Body(
        student.apply,
        None if teacher is None else teacher.apply,
        optax.with_extra_args_support(optimizer).update,
        objective(metric, coef, task_coef, has_teacher=teacher is not None),
        axis,
    )


def apart(step: Any) -> Step:
    """Let a donating step take a teacher that is the student itself, as it is now.

    A buffer that is donated and read in one call ends the process.
    """

    def call(state, teacher_variables, batch):
        donated = set(map(_buffer, jax.tree.leaves(state)))
        if any(_buffer(leaf) in donated for leaf in jax.tree.leaves(teacher_variables)):
            teacher_variables = owned(teacher_variables)
        x, labels = batch
        return step(state, teacher_variables, (x, integer_labels(labels)))

    return call


def _buffer(array: Any) -> int:
    """Return where an array lies: two objects may be one piece of memory."""
    try:
        shards = array.addressable_shards
        return (shards[0].data if len(shards) > 1 else array).unsafe_buffer_pointer()
    except (AttributeError, ValueError, RuntimeError, NotImplementedError, TypeError):
        return id(array)  # traced, NumPy's, or keys


def _like(new: Any, old: Any) -> Any:
    """Return a state with the structure and dtypes that it had, so that a step compiles once.

    What a call adds (sown intermediates, say) is left out.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(old)
    found = dict(jax.tree_util.tree_leaves_with_path(new))
    leaves = [jnp.asarray(found.get(path, leaf)) for path, leaf in pairs]
    leaves = [
        x if x.dtype == leaf.dtype else x.astype(leaf.dtype)
        for x, (_, leaf) in zip(leaves, pairs, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def _accuracy(out: Outputs, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(jnp.asarray(out.logits), axis=-1) == labels, dtype=jnp.float32)
