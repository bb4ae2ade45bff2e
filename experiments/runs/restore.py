"""A network as a checkpoint folder of a run has it."""

import pathlib

from flax import nnx

from kd2m_jax import restore

from ..common.errors import UsageError


def last(model: nnx.Module, folder: pathlib.Path) -> nnx.Module:
    """Return a network as a checkpoint folder's last epoch has it; ``model`` is one of its kind."""
    if not (folder / "last").exists():
        raise UsageError(f"there is no checkpoint in {folder}: has it been moved?")
    return restore(folder, [model])[0]  # a list, because `fit` saves a population, here of one
