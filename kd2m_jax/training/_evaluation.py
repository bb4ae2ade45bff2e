"""Evaluation between epochs, on arrays that lie on the devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd2m_jax.adapters import DEVICES, Apply, Network
from kd2m_jax.training._processes import summed
from kd2m_jax.training._programs import shared
from kd2m_jax.training._step import evaluation_sums


def evaluators(networks: list[Network], data: Any, preprocess: Callable, mesh: Mesh):
    """Return a function of variables for each network: its scores over all examples, or none."""
    if data is None:
        return [lambda variables: {}] * len(networks)
    x, labels = (jnp.asarray(a)[jax.process_index() :: jax.process_count()] for a in data)
    # One shape for all batches, split over the devices; the last one is padded with labels that
    # do not count.
    size = -(-min(len(x), 500) // mesh.size) * mesh.size
    padding = -len(x) % size
    x = jnp.concatenate([x, jnp.zeros((padding, *x.shape[1:]), x.dtype)])
    labels = jnp.concatenate([labels.astype(jnp.int32), jnp.full(padding, -1, jnp.int32)])
    split = NamedSharding(mesh, PartitionSpec(None, DEVICES))
    x, labels = (jax.device_put(a.reshape(-1, size, *a.shape[1:]), split) for a in (x, labels))

    def evaluator(network: Network):
        eval_step = shared(_program, network.apply, preprocess)

        def evaluate(variables):
            parts = [eval_step(variables, batch) for batch in zip(x, labels, strict=True)]
            sums = summed({name: sum(float(part[name]) for part in parts) for name in parts[0]})
            return {
                "test_loss": sums["loss"] / sums["count"],
                "test_accuracy": sums["correct"] / sums["count"],
            }

        return evaluate

    return [evaluator(network) for network in networks]


def _program(apply: Apply, preprocess: Callable):
    @jax.jit
    def program(variables, batch):
        x, labels = batch
        return evaluation_sums(apply, variables, (preprocess(x, None), labels))

    return program
