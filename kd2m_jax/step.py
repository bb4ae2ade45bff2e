"""Algorithm 1 as one XLA program: student and teacher forward, both losses, the update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from kd2m_jax.losses import Metric, MetricSum, distillation_loss
from kd2m_jax.losses._metrics import resolve
from kd2m_jax.networks import Network
from kd2m_jax.outputs import Outputs

Coef = float | Callable[[ArrayLike], Any]

# coef="auto": the ratio if none is given, and how much of the means of the gradients' norms a
# step keeps.
RATIO, MEMORY = 0.1, 0.8


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

    params: Any
    model_state: Any
    opt_state: Any
    grad_norms: jax.Array
    step: jax.Array
    key: jax.Array

    @property
    def variables(self) -> tuple[Any, Any]:
        """``(params, model_state)``, what evaluation and a later student need of a teacher."""
        return self.params, self.model_state


Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def init_state(
    network: Network, optimizer: optax.GradientTransformation, x: ArrayLike, *, key: jax.Array
) -> TrainState:
    """The state before the first step.

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
    params, model_state = jax.tree.map(jnp.array, network.init(init_key, jnp.asarray(x)))
    norms, step = jnp.zeros(2, jnp.float32), jnp.zeros((), jnp.int32)
    return TrainState(params, model_state, optimizer.init(params), norms, step, key)


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
    return jax.jit(body, donate_argnums=0)


def step_body(
    student: Network,
    teacher: Network | None,
    optimizer: optax.GradientTransformation,
    *,
    metric: Metric | MetricSum | str | None,
    coef: Coef | str,
    task_coef: Coef,
    axis: str | None,
) -> Step:
    """What every kind of step runs: on one device, or on each device of a named axis.

    On several devices each sees its part of the batch, and features, logits and labels are
    gathered first: a distance between distributions is not the mean of the shards' distances.
    Every device then differentiates the same global loss through its own part. The gathering's
    transpose adds the devices' equal gradients up, and the mean over devices takes that factor
    out again.
    """
    metric = resolve(metric)
    if metric is not None and teacher is None:
        raise ValueError(f"metric {metric.label!r} compares with a teacher, and there is none")
    ratio = None
    if isinstance(coef, str):
        ratio, coef = auto_ratio(coef), 0.0
        if not callable(task_coef) and task_coef == 0:
            raise ValueError("coef='auto' follows the cross-entropy's gradient: task_coef is 0")
    for name, weight in (("coef", coef), ("task_coef", task_coef)):
        if not callable(weight) and not weight >= 0:
            raise ValueError(f"{name} must be >= 0, got {weight}")

    def gather(tree):
        return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)

    def mean(tree):
        return tree if axis is None else jax.lax.pmean(tree, axis)

    def step(state: TrainState, teacher_variables, batch):
        x, labels = batch
        dropout_key, metric_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        if axis is not None:
            dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis))
        weights: list[Any] = [w(state.step) if callable(w) else w for w in (coef, task_coef)]
        seen_by_teacher = None
        if teacher is not None:
            seen_by_teacher, _ = teacher.apply(*teacher_variables, x, train=False, rng=None)
            seen_by_teacher = gather(jax.lax.stop_gradient(seen_by_teacher))
        all_labels = gather(labels)

        def loss_fn(params):
            out, model_state = student.apply(
                params, state.model_state, x, train=True, rng=dropout_key
            )
            out = gather(out)
            loss, terms = distillation_loss(
                out,
                out if seen_by_teacher is None else seen_by_teacher,
                all_labels,
                metric=metric,
                coef=weights[0],
                task_coef=weights[1],
                key=metric_key,
            )
            return loss, (terms, _accuracy(out, all_labels), model_state)

        norms = state.grad_norms
        if ratio is None:
            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            grads = mean(grads)
        else:
            # The two terms' gradients apart, from one forward pass.
            def terms_fn(params):
                _, aux = loss_fn(params)
                return (aux[0].task, aux[0].distillation), aux

            (task, distance), pullback, aux = jax.vjp(terms_fn, state.params, has_aux=True)
            (of_task,) = pullback((jnp.full_like(task, weights[1]), jnp.zeros_like(distance)))
            (of_distance,) = pullback((jnp.zeros_like(task), jnp.ones_like(distance)))
            of_task, of_distance = mean(of_task), mean(of_distance)
            new = jnp.stack([optax.tree.norm(g) for g in (of_task, of_distance)])
            # Both start at zero, so the bias of the first steps cancels in their ratio.
            norms = MEMORY * norms + (1 - MEMORY) * new.astype(norms.dtype)
            weights[0] = jnp.where(norms[1] > 0, ratio * norms[0] / norms[1], 0)
            grads = jax.tree.map(lambda t, d: t + weights[0] * d, of_task, of_distance)
            loss = weights[1] * task + weights[0] * distance
        terms, accuracy, model_state = aux
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "task_loss": terms.task,
            "distillation_loss": terms.distillation,
            "coef": jnp.asarray(weights[0], jnp.float32),
            "accuracy": accuracy,
            **{f"distillation_loss/{name}": value for name, value in terms.parts.items()},
        }
        params = optax.apply_updates(state.params, updates)
        state = TrainState(params, mean(model_state), opt_state, norms, state.step + 1, state.key)
        return state, mean(metrics)

    return step


def auto_ratio(coef: str) -> float:
    """RATIO of "auto:RATIO", or of "auto" the default; ValueError for anything else."""
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


def _accuracy(out: Outputs, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(jnp.asarray(out.logits), axis=-1) == labels, dtype=jnp.float32)


def make_eval_step(network: Network) -> Callable[..., dict[str, jax.Array]]:
    """Evaluation of one batch, compiled, as sums: add them up, then divide.

    Args:
      network: any `Network`; it runs in evaluation mode.

    Returns:
      ``eval_step(variables, (x, labels)) -> sums`` with ``correct``, ``loss`` (cross-entropy in
      nats) and ``count``. Examples with a negative label do not count, so a last partial batch
      is padded with label -1 and nothing is compiled again.

    Raises:
      Whatever the network raises for such an ``x`` ``[n, ...]``; labels are ``[n]`` integers.

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

    @jax.jit
    def eval_step(variables, batch):
        x, labels = batch
        out, _ = network.apply(*variables, x, train=False, rng=None)
        counted = labels >= 0
        logits = jnp.asarray(
            out.logits, jnp.promote_types(jnp.asarray(out.logits).dtype, jnp.float32)
        )
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(counted, labels, 0)
        )
        return {
            "correct": jnp.sum(counted & (jnp.argmax(logits, axis=-1) == labels)),
            "loss": jnp.sum(jnp.where(counted, losses, 0)),
            "count": jnp.sum(counted),
        }

    return eval_step
