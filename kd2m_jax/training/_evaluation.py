"""Evaluation, of a batch and of arrays that lie on the devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd2m_jax.adapters import DEVICES, Apply, Network
from kd2m_jax.losses._checks import are_distributions, integer_labels
from kd2m_jax.training._examples import check_memory, examples, has_labels
from kd2m_jax.training._preprocess import Prepare
from kd2m_jax.training._processes import summed
from kd2m_jax.training._programs import shared


def make_eval_step(network: Network) -> Callable[..., dict[str, jax.Array]]:
    """Compile the evaluation of one batch, as sums: add them up, then divide.

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
    program = jax.jit(functools.partial(evaluation_sums, network.apply))

    def eval_step(variables, batch):
        x, labels = batch
        return program(variables, (x, integer_labels(labels)))

    return eval_step


def evaluation_sums(apply: Apply, variables: Any, batch: Any) -> dict[str, jax.Array]:
    """Return what `make_eval_step` adds up for a batch."""
    (params, state), (x, labels) = variables, batch
    out, _ = apply(params, state, x, train=False, rng=None)
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


def evaluators(networks: list[Network], data: Any, prepare: Prepare, mesh: Mesh, classes: int):
    """Return a function of variables for each network: its scores over all examples, or none.

    ValueError or TypeError for data that is not ``(x, labels)`` arrays.
    """
    if data is None:
        return [lambda variables: {}] * len(networks)
    check_memory("eval_data", data, mesh.devices.flat[0])
    x, labels, *_ = examples("eval_data", data, classes)
    if are_distributions(labels) or not has_labels(labels):
        raise ValueError("eval_data needs class numbers [n] as labels, -1 where there is none")
    # One shape for all batches, split over the devices; the last one is padded with labels that
    # do not count.
    own = slice(jax.process_index(), None, jax.process_count())
    count = len(labels[own])
    size = -(-min(count, 500) // mesh.size) * mesh.size
    padding = -count % size
    split = NamedSharding(mesh, PartitionSpec(None, DEVICES))

    def batched(array, fill=0):
        array = jnp.asarray(array)[own]
        array = jnp.concatenate([array, jnp.full((padding, *array.shape[1:]), fill, array.dtype)])
        return jax.device_put(array.reshape(-1, size, *array.shape[1:]), split)

    x = jax.tree.map(batched, x)
    labels = batched(jnp.asarray(labels, jnp.int32), fill=-1)
    batches = [jax.tree.map(lambda a, i=i: a[i], (x, labels)) for i in range(len(labels))]

    def evaluator(network: Network):
        eval_step = shared(_program, network.apply, prepare)

        def evaluate(variables):
            parts = [eval_step(variables, batch) for batch in batches]
            sums = summed({name: sum(float(part[name]) for part in parts) for name in parts[0]})
            return {
                "test_loss": sums["loss"] / sums["count"],
                "test_accuracy": sums["correct"] / sums["count"],
            }

        return evaluate

    return [evaluator(network) for network in networks]


def _program(apply: Apply, prepare: Prepare):
    @jax.jit
    def program(variables, batch):
        x, labels = batch
        x, _ = prepare(x, labels, None)
        return evaluation_sums(apply, variables, (x, labels))

    return program
