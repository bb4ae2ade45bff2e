"""The training step on several devices: one body under pmap and under shard_map."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kd2m_jax.adapters import DEVICES, Network
from kd2m_jax.losses._resolve import AnyMetric
from kd2m_jax.training._body import Coef, TaskLoss, step_body
from kd2m_jax.training._labels import Unlabelled
from kd2m_jax.training._step import Step, apart


def pmap_step(
    student: Network,
    teacher: Network | None,
    optimizer: optax.GradientTransformation,
    *,
    metric: AnyMetric,
    coef: Coef | str = 1.0,
    task_coef: Coef = 1.0,
    unlabelled: Unlabelled = None,
    task_loss: TaskLoss | None = None,
    devices: Sequence[object] | None = None,
) -> Step:
    """`make_train_step` over this process's devices with ``jax.pmap``.

    Takes and returns what `make_train_step`'s step does, unreplicated: the batch is split over
    the devices, everything else is the same on all of them. The metric sees the whole batch and
    BatchNorm is synchronised, so the result does not depend on the number of devices (dropout
    draws apart).

    Args:
      student: the network to train.
      teacher: the frozen network, or None.
      optimizer: an optax optimizer.
      metric: as in `make_train_step`.
      coef: as in `make_train_step`.
      task_coef: as in `make_train_step`.
      unlabelled: as in `make_train_step`.
      task_loss: as in `make_train_step`.
      devices: the devices to use; all local ones by default.

    Returns:
      ``step(state, teacher_variables, (x, labels)) -> (state, metrics)``, x ``[n, ...]`` and labels
      ``[n]`` (or ``[n, k]``) the whole batch.

    Raises:
      ValueError: when called with a batch that the number of devices does not divide.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from kd2m_jax import from_nnx, init_state, models
      >>> network = from_nnx(models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0)))
      >>> x, labels, optimizer = jnp.ones((8, 4)), jnp.zeros(8, int), optax.sgd(0.1)
      >>> step = pmap_step(network, network, optimizer, metric="w2", coef=0.1)
      >>> state = init_state(network, optimizer, x, key=jax.random.key(0))
      >>> state, metrics = step(state, network.init(None, x), (x, labels))
      >>> print(state.step)
      1
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
        axis=DEVICES,
    )
    devices = list(devices or jax.local_devices())
    mapped = jax.pmap(
        body,
        axis_name=DEVICES,
        in_axes=(None, None, 0),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )

    where = NamedSharding(Mesh(np.array(devices), (DEVICES,)), PartitionSpec(DEVICES))

    def step(state, teacher_variables, batch):
        _check_divisible(batch, len(devices))
        with without_mesh():
            batch = jax.device_put(batch, where)  # it may lie on a mesh of the caller's
            split = jax.tree.map(
                lambda a: a.reshape(len(devices), a.shape[0] // len(devices), *a.shape[1:]), batch
            )
            return mapped(state, teacher_variables, split)

    return apart(step, any_labels=task_loss is not None)


def shard_map_step(
    student: Network,
    teacher: Network | None,
    optimizer: optax.GradientTransformation,
    *,
    metric: AnyMetric,
    coef: Coef | str = 1.0,
    task_coef: Coef = 1.0,
    unlabelled: Unlabelled = None,
    task_loss: TaskLoss | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Step:
    """`make_train_step` over a mesh with ``jax.shard_map``, the successor of pmap.

    The same body as `pmap_step`, with the same results. On several hosts call
    ``jax.distributed.initialize`` first and pass global arrays, as
    ``jax.make_array_from_process_local_data`` makes them from each host's part of the batch.

    Args:
      student: the network to train.
      teacher: the frozen network, or None.
      optimizer: an optax optimizer.
      metric: as in `make_train_step`.
      coef: as in `make_train_step`.
      task_coef: as in `make_train_step`.
      unlabelled: as in `make_train_step`.
      task_loss: as in `make_train_step`.
      mesh: a mesh with one axis called "devices"; all devices of all hosts by default.

    Returns:
      ``step(state, teacher_variables, (x, labels)) -> (state, metrics)``, x ``[n, ...]`` and labels
      ``[n]`` (or ``[n, k]``) the whole batch.

    Raises:
      ValueError: when called with a batch that the number of devices does not divide, or for a
        mesh with other axes.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from kd2m_jax import from_nnx, init_state, models
      >>> network = from_nnx(models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0)))
      >>> x, labels, optimizer = jnp.ones((8, 4)), jnp.zeros(8, int), optax.sgd(0.1)
      >>> step = shard_map_step(network, network, optimizer, metric="w2", coef=0.1)
      >>> state = init_state(network, optimizer, x, key=jax.random.key(0))
      >>> state, metrics = step(state, network.init(None, x), (x, labels))
      >>> print(state.step)
      1
    """
    if mesh is None:
        mesh = jax.make_mesh((jax.device_count(),), (DEVICES,), axis_types=(AxisType.Auto,))
    if mesh.axis_names != (DEVICES,):
        raise ValueError(f"the mesh needs the one axis {DEVICES!r}, got {mesh.axis_names}")
    body = step_body(
        student,
        teacher,
        optimizer,
        metric=metric,
        coef=coef,
        task_coef=task_coef,
        unlabelled=unlabelled,
        task_loss=task_loss,
        axis=DEVICES,
    )
    everywhere, split = PartitionSpec(), PartitionSpec(DEVICES)
    # check_vma=False: with it, shard_map itself inserts sums into the gradient of a gathered
    # loss, which comes out too large by the number of devices (measured on jax 0.10 and 0.12).
    mapped: Callable = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(everywhere, everywhere, split),
            out_specs=everywhere,
            check_vma=False,
        ),
        donate_argnums=0,
    )

    where = NamedSharding(mesh, split)

    def placed(array):
        """Bring an array over that lies on an explicit mesh of the caller's."""
        explicit = jax.typeof(array).sharding.mesh.explicit_axes
        return jax.device_put(array, where) if explicit else array

    def step(state, teacher_variables, batch):
        _check_divisible(batch, mesh.size)
        with without_mesh():
            return mapped(state, teacher_variables, jax.tree.map(placed, batch))

    return apart(step, any_labels=task_loss is not None)


@contextlib.contextmanager
def without_mesh() -> Iterator[None]:
    """Set a mesh aside that the caller has set: what runs inside brings its own."""
    with contextlib.ExitStack() as stack:
        if not jax.sharding.get_abstract_mesh().empty:
            with contextlib.suppress(ValueError):  # while a program is traced it cannot be
                stack.enter_context(jax.set_mesh(Mesh(np.empty((), object), ())))
        yield


def _check_divisible(batch, devices: int) -> None:
    n = batch[1].shape[0]
    if n % devices:
        raise ValueError(f"a batch of {n} does not split evenly over {devices} devices")
