"""A network as a checkpoint folder of a run has it."""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from kd2m_jax import Network, init_state
from kd2m_jax.internal import Checkpoints, as_network

from ..common.errors import UsageError
from .build import Plan


def last(model: nnx.Module | Network, folder: pathlib.Path, plan: Plan) -> nnx.Module:
    """Return a network as a checkpoint folder's last epoch has it; ``model`` is one of its kind."""
    if not (folder / "last").exists():
        raise UsageError(f"there is no checkpoint in {folder}: has it been moved?")
    network = as_network(model)
    x = jnp.zeros((1, *plan.dataset.train[0].shape[1:]))
    state = init_state(network, plan.options["optimizer"], x, key=jax.random.key(0))
    with contextlib.closing(Checkpoints(folder, writing=False)) as checkpoints:
        # A list, because `fit` saves a population, here of one.
        restored = checkpoints.restore([state])
    if restored is None:
        raise UsageError(f"the checkpoints in {folder} cannot be read")
    return network.export(*restored[0][0].variables)
