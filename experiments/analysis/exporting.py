"""A trained network as a file that other programs read."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..common import files
from ..common.errors import UsageError
from .trained import Trained

FORMATS = ("safetensors", "jax")


def write(one: Trained, kind: str) -> pathlib.Path:
    """Write a network into its run folder; returns the file.

    "safetensors": its weights by their paths (``layers/0/conv/kernel``), and in the metadata how
    to build it and what it expects. "jax": a program of `jax.export`, uint8 images ``[n, height,
    width, channels]`` -> logits, normalisation included, for any n, on CPU, GPU and TPU.
    """
    file = one.folder.path / f"{one.which}.{kind}"
    if kind == "safetensors":
        _safetensors(one, file)
    else:
        _program(one, file)
    return file


def description(one: Trained) -> dict[str, Any]:
    """Return what it takes to build a network and to feed it."""
    return {
        "network": one.name,
        "stem": one.config.stem,
        "classes": list(one.classes),
        "image_shape": list(one.shape),
        **one.facts,
    }


def _safetensors(one: Trained, file: pathlib.Path) -> None:
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise UsageError("--format=safetensors needs it: pip install safetensors") from error
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(one.module))
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }
    files.write(file, save(named, metadata={"kd2m_jax": json.dumps(description(one))}))


def _program(one: Trained, file: pathlib.Path) -> None:
    from jax import export

    (n,) = export.symbolic_shape("n")
    program = export.export(jax.jit(lambda x: one(x).logits), platforms=("cpu", "cuda", "tpu"))
    exported = program(jax.ShapeDtypeStruct((n, *one.shape), jnp.uint8))
    try:
        files.write(file, bytes(exported.serialize()))
    except ImportError as error:
        raise UsageError("--format=jax needs flatbuffers: pip install flatbuffers") from error
