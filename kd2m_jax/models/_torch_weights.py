"""Weights of torchvision's and timm's ResNets, put into ours."""

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from kd2m_jax._compat import set_value
from kd2m_jax.models._torch_files import read_tensors

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load_torch_weights(
    model: nnx.Module, path: str | os.PathLike, *, replace_head: bool = False
) -> nnx.Module:
    """Put the weights of a torchvision or timm ResNet checkpoint into one of our ResNets.

    Kernels are transposed from ``[out, in, h, w]`` to ``[h, w, in, out]``. The running statistics
    of batch normalisation are loaded too. Parameters keep the model's dtype. Torchvision's
    networks need ``stem="imagenet"`` and RGB images in 0..1, from which (0.485, 0.456, 0.406) is
    subtracted before they are divided by (0.229, 0.224, 0.225).

    Args:
      model: a ``ResNet`` of :mod:`kd2m_jax.models`, which is changed in place. When anything does
        not fit, nothing is changed. Without ``replace_head`` it may be abstract, from
        ``nnx.eval_shape``, which saves drawing weights that are replaced at once.
      path: a ``.safetensors`` file; a file of ``torch.save`` (since torch 1.6), with a state
        dict or a dict that holds one under a usual name (``state_dict``, ``model``,
        ``model_state_dict``, ``net``), where an average of the weights beside it
        (``state_dict_ema``, ``model_ema``) is taken in its place and that is logged; or
        ``hf:<owner>/<name>``, which downloads ``model.safetensors`` from there with the package
        ``huggingface_hub``: ``hf:timm/resnet34.tv_in1k`` are torchvision's weights. A prefix
        before the network's names (``module.``, ``_orig_mod.``, ``backbone.``) is left out, and
        so are entries without it. What is pickled in a file is never run: anything but tensors
        in plain containers is refused.
      replace_head: keep the model's fresh classifier ``fc`` where the file has none, or one for
        another number of classes.

    Returns:
      The model.

    Raises:
      ValueError: if the file cannot be read, or its entries are not those of the model; the
        message lists the missing, the unexpected and the misshapen ones.
      OSError: if there is no such file, or the download fails.
      ImportError: for ``hf:`` without ``huggingface_hub``.

    Example:
      >>> from flax import nnx
      >>> from kd2m_jax import models
      >>> make = lambda: models.resnet34(1000, stem="imagenet", rngs=nnx.Rngs(0))
      >>> teacher = nnx.eval_shape(make)
      >>> models.load_torch_weights(teacher, "no-such-file.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: [Errno 2] No such file or directory: 'no-such-file.safetensors'
    """
    file = local_file(path)
    variables = {
        _torch_name(route): variable
        for route, variable in nnx.iter_graph(model)
        if isinstance(variable, nnx.Param | nnx.BatchStat)
    }
    arrays = {
        name: array.transpose((2, 3, 1, 0)) if array.ndim == 4 else array.T
        for name, array in _without_prefix(read_tensors(file), variables.keys(), path).items()
    }
    heads = [getattr(named.get("fc.weight"), "shape", None) for named in (arrays, variables)]
    replaced = replace_head and heads[0] != heads[1]
    if replaced:
        for name in ("fc.weight", "fc.bias"):
            arrays.pop(name, None)
            variables.pop(name, None)
    shapes = {name: variable.shape for name, variable in variables.items()}
    problems = _misfits({name: array.shape for name, array in arrays.items()}, shapes)
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems)}")
    for name, variable in variables.items():
        set_value(variable, jnp.array(arrays[name], variable.dtype))
    if replaced:
        logging.getLogger(__name__).info("%s: head replaced, fc keeps its fresh weights", path)
    return model


def _without_prefix(named: dict[str, Any], wanted: Collection[str], path) -> dict[str, Any]:
    """Return what lies under the prefix with which the file has most of the model's names.

    Wrappers put one before them, and parts of a larger model (a projection head, say) have none or
    another. ValueError where two prefixes have as many: the weights of two networks.
    """
    prefixes = {""}
    for name in named:
        parts = name.split(".")[:-1]
        prefixes |= {".".join(parts[: i + 1]) + "." for i in range(min(len(parts), 4))}

    def under(prefix: str) -> dict[str, Any]:
        return {n.removeprefix(prefix): a for n, a in named.items() if n.startswith(prefix)}

    found = {prefix: len(under(prefix).keys() & wanted) for prefix in sorted(prefixes)}
    most = max(found.values())
    best = [prefix for prefix, count in found.items() if count == most]
    if found[""] == most or 2 * most < len(wanted):
        return named
    if len(best) > 1:
        raise ValueError(
            f"{path} holds several networks, with the prefixes {', '.join(best)}: save one of them"
        )
    return under(best[0])


def _torch_name(route: tuple) -> str:
    """Give torch's name of a variable: ("stages", 0, 1, "bn1", "scale") is layer1.1.bn1.weight."""
    if route[0] == "stages":
        route = (f"layer{route[1] + 1}", *route[2:])
    return ".".join(map(str, (*route[:-1], _LEAVES.get(route[-1], route[-1]))))


def _misfits(file: dict[str, tuple], model: dict[str, tuple]) -> list[str]:
    """Say how the entries of a file, by name and shape, differ from the entries of the model."""
    misshapen = sorted(name for name in file.keys() & model.keys() if file[name] != model[name])
    problems = [
        f"{what}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if names[6:] else "")
        for what, names in (
            ("missing from the file", sorted(model.keys() - file.keys())),
            ("not in the model", sorted(file.keys() - model.keys())),
            (
                "shapes in the file and in the model",
                [f"{name} {file[name]} and {model[name]}" for name in misshapen],
            ),
        )
        if names
    ]
    if "conv1.weight" in misshapen and file["conv1.weight"][0] != model["conv1.weight"][0]:
        stem = "imagenet" if file["conv1.weight"][0] == 7 else "cifar"
        problems.append(f'for this stem, make the model with stem="{stem}" (--stem={stem})')
    if "fc.weight" in misshapen:
        problems.append("for other classes, replace_head=True keeps the model's own head")
    return problems


def local_file(path: str | os.PathLike) -> Path:
    """Find the file of weights, which is downloaded first if its name begins with ``hf:``."""
    name = os.fspath(path)
    if not name.startswith("hf:"):
        return Path(path)
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"to download {name}: pip install huggingface_hub") from error
    try:
        return Path(hf_hub_download(name.removeprefix("hf:"), "model.safetensors"))
    except Exception as error:  # the hub raises errors of many libraries
        raise OSError(f"could not download model.safetensors of {name}: {error}") from error
