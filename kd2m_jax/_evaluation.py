"""Evaluation between epochs, on arrays that lie on the devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd2m_jax._processes import summed
from kd2m_jax.networks import DEVICES, Network
from kd2m_jax.step import make_eval_step


def evaluators(students, networks, data: Any, preprocess: Callable, mesh: Mesh):
    """A function of variables for each: accuracy and loss over all examples, or nothing."""
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

    def evaluator(network):
        prepared = Network(
            network.init,
            lambda params, state, x, **options: network.apply(
                params, state, preprocess(x, None), **options
            ),
        )
        eval_step = make_eval_step(prepared)

        def evaluate(variables):
            parts = [eval_step(variables, batch) for batch in zip(x, labels, strict=True)]
            sums = summed({name: sum(float(part[name]) for part in parts) for name in parts[0]})
            return {
                "test_loss": sums["loss"] / sums["count"],
                "test_accuracy": sums["correct"] / sums["count"],
            }

        return evaluate

    # Networks of one structure share one program: seeds, lambdas and metrics do not show in it.
    kinds = [nnx.graphdef(s) if isinstance(s, nnx.Module) else id(s) for s in students]
    made = {kind: evaluator(n) for kind, n in reversed(list(zip(kinds, networks, strict=True)))}
    return [made[kind] for kind in kinds]
