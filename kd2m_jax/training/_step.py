"""Training steps on one device, and the state that they replace."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from kd2m_jax.adapters import Network, Tree
from kd2m_jax.losses._checks import are_distributions, integer_labels
from kd2m_jax.losses._resolve import AnyMetric
from kd2m_jax.training._body import Batch, Coef, TaskLoss, TrainState, step_body
from kd2m_jax.training._labels import Unlabelled
from kd2m_jax.training._programs import shared


class Step(Protocol):
    """One training step: ``(state, teacher_variables, (x, labels)) -> (state, metrics)``.

    With ``teacher=None`` and a metric, ``(x, labels, outputs)``: the teacher's `Outputs` for x.
    """

    def __call__(
        self, state: TrainState, teacher_variables: Tree, batch: tuple[Any, ...], /
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
      Exception: what the network's ``init`` raises for such an ``x``.

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
    metric: AnyMetric,
    coef: Coef | str = 1.0,
    task_coef: Coef = 1.0,
    unlabelled: Unlabelled = None,
    task_loss: TaskLoss | None = None,
) -> Step:
    """One training step on one device, compiled as one program.

    ``loss = task_coef * cross-entropy(labels, student) + coef * metric(student, teacher)``. The
    teacher runs in evaluation mode on the same batch; its variables are an argument that is
    neither differentiated nor donated nor updated.

    Args:
      student: the network to train.
      teacher: the frozen network, or None to train without one: then the metric is None, or the
        batch brings the teacher's outputs.
      optimizer: an optax optimizer of the student's parameters.
      metric: a name from ``losses.METRICS``, a `losses.Metric`, one of the losses
        (``losses.cw2``), a function of your own as `kd2m_jax.fit` takes it, or None for
        cross-entropy alone.
      coef: >= 0, lambda: a number, an optax schedule of the step number, or "auto:RATIO". That
        keeps the norm of lambda's part of the gradient at RATIO times that of the cross-entropy's
        part, both with respect to all of the student's parameters (a projector's too): the one
        place that both reach in any network. The norms are exponential means over about five
        steps: lambda follows the training smoothly and lags where a norm changes within so few.
        It costs one more backward pass.
        "auto" alone is "auto:0.1".
      task_coef: >= 0, a number or a schedule.
      unlabelled: the class that a conditional metric takes for an example of label -1: "teacher"
        (what the teacher predicts), "drop" (it is left out), "own" (what the student predicts),
        "balanced" (the same after Sinkhorn balancing of the batch's unlabelled rows to equal
        shares of the classes) or ``("balanced", shares)``. None is "teacher" where the teacher has
        logits for the same images, else "balanced".
      task_loss: ``(Outputs, labels) -> a scalar or [n]``, in place of the cross-entropy
        (regression, several labels at once): labels are then whatever it takes, with one row per
        example, and there is no accuracy. A conditional metric takes ``[n]`` integers for
        classes; other labels are none to it.

    Returns:
      ``step(state, teacher_variables, (x, labels)) -> (state, metrics)``: x ``[n, ...]``, labels
      ``[n]`` integers, -1 for none, or ``[n, k]`` floating, distributions over the classes;
      teacher_variables are ``(params, state)`` as the teacher's ``init`` or a trained
      ``TrainState.variables`` gives them (None without a teacher). A batch ``(x, labels,
      outputs)`` brings the teacher's `Outputs`, where ``teacher`` is None. The old state is
      donated. ``metrics`` has the float32 scalars ``loss``, ``task_loss`` (nats, mean over the
      labelled rows, 0 without any), ``distillation_loss`` (the metric's unit), ``coef`` and
      ``accuracy`` in [0, 1] (of the labelled rows, NaN without any), and for a sum of metrics
      ``distillation_loss/NAME`` for each.

    Raises:
      ValueError: a negative weight or one that cannot be read, an unknown metric or rule, or,
        at the first call, a metric without a teacher.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from kd2m_jax import from_nnx, models
      >>> teacher, student = (
      ...     from_nnx(models.MLP((w, 8), 3, in_features=4, rngs=nnx.Rngs(w)))
      ...     for w in (32, 8))
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
        student,
        teacher,
        optimizer,
        metric=metric,
        coef=coef,
        task_coef=task_coef,
        unlabelled=unlabelled,
        task_loss=task_loss,
        axis=None,
    )
    return apart(jax.jit(body, donate_argnums=0), any_labels=task_loss is not None)


def apart(step: Any, *, any_labels: bool = False) -> Step:
    """Let a donating step take a teacher that is the student itself, as it is now.

    A buffer that is donated and read in one call ends the process.
    """

    def call(state, teacher_variables, batch):
        donated = set(map(_buffer, jax.tree.leaves(state)))
        if any(_buffer(leaf) in donated for leaf in jax.tree.leaves(teacher_variables)):
            teacher_variables = owned(teacher_variables)
        if not 2 <= len(batch) <= 3:
            raise ValueError(
                f"a batch is (x, labels) or (x, labels, outputs), got {len(batch)} parts"
            )
        x, labels, *teacher = batch
        if not any_labels and not are_distributions(labels):
            labels = integer_labels(labels)
        return step(state, teacher_variables, Batch(x, labels, *teacher))

    return call


def _buffer(array: Any) -> int:
    """Return where an array lies: two objects may be one piece of memory."""
    try:
        shards = array.addressable_shards
        return (shards[0].data if len(shards) > 1 else array).unsafe_buffer_pointer()
    except (AttributeError, ValueError, RuntimeError, NotImplementedError, TypeError):
        return id(array)  # traced, NumPy's, or keys
