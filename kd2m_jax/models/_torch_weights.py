"""Read torch checkpoints without torch, and without running what is pickled in them."""

import functools
import io
import json
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd2m_jax._compat import set_value

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
}


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
        dict or a dict that holds one as ``state_dict`` or ``model``; or ``hf:<owner>/<name>``,
        which downloads ``model.safetensors`` from there with the package ``huggingface_hub``:
        ``hf:timm/resnet34.tv_in1k`` are torchvision's weights. What is pickled in a file is
        never run: anything but tensors in plain containers is refused.
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
    arrays = {
        name: array.transpose((2, 3, 1, 0)) if array.ndim == 4 else array.T
        for name, array in _read(file).items()
    }
    variables = {
        _torch_name(route): variable
        for route, variable in nnx.iter_graph(model)
        if isinstance(variable, nnx.Param | nnx.BatchStat)
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


def _read(path: Path) -> dict[str, np.ndarray]:
    """Read a checkpoint's tensors by name, in torch's layout, without the batch counters."""
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start.startswith(b"PK"):
            return _read_zip(path)
        if start.endswith(b"{"):
            return _read_safetensors(path.read_bytes())
    except Exception as error:  # a damaged or hostile file may fail anywhere in these formats
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    raise ValueError(
        f"{path} is neither a .safetensors file nor one that torch.save has written since torch "
        "1.6. An older one can be written anew where torch is installed: "
        "torch.save(torch.load(path, map_location='cpu'), new_path)"
    )


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Read a file of the header's length in 8 bytes, a JSON header, then the values."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in _weights(header).items():
        first, last = entry["data_offsets"]
        values = np.frombuffer(data[begin + first : begin + last], _dtype(entry["dtype"]))
        arrays[name] = values.reshape(entry["shape"])
    return arrays


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    """Read a zipped folder with ``data.pkl``, whose tensors point to storages ``data/<key>``."""
    with zipfile.ZipFile(path) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        state = _Unpickler(io.BytesIO(archive.read(index))).load()
        for key in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a state dict")

        @functools.cache  # tensors may share a storage
        def storage(kind: str, key: str, size: int) -> np.ndarray:
            return np.frombuffer(archive.read(f"{folder}data/{key}"), _dtype(kind), size)

        arrays = {}
        for name, tensor in _weights(state).items():
            if not isinstance(tensor, _Tensor):
                raise ValueError(f"its entry {name!r} is a {type(tensor).__name__}, not a tensor")
            _, kind, key, _, size = tensor.storage
            arrays[name] = _strided(storage(kind, key, size), tensor)
    return arrays


def _weights(state: dict[str, Any]) -> dict[str, Any]:
    """Drop the data-parallel prefix of names, and the batch counters, which nothing reads."""
    return {
        name.removeprefix("module."): entry
        for name, entry in state.items()
        if not name.endswith("num_batches_tracked")
    }


def _dtype(name: str) -> np.dtype:
    if name not in _DTYPES:
        raise ValueError(
            f"values of type {name} are not read, only floating point of 16 to 64 bits"
        )
    return np.dtype(_DTYPES[name])


def _strided(values: np.ndarray, tensor: "_Tensor") -> np.ndarray:
    """View a tensor's values in its storage.

    The sizes come from the file, and NumPy does not check that they stay within the storage.
    """
    _, offset, shape, strides = tensor
    reach = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides, 0) < 0 or 0 in shape or reach >= len(values):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its {len(values)} values")
    steps = [step * values.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)


class _Tensor(NamedTuple):
    """Hold the description in a pickled tensor; the values are looked up later."""

    storage: tuple
    offset: int
    shape: tuple
    strides: tuple


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor, *_):
    return tensor


_GLOBALS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Unpickler(pickle.Unpickler):
    """Read tensors in plain containers, and nothing else.

    A pickle can only name a function here that stores its arguments, an ordered dict, or a string
    in place of a type of torch. No name is imported, and nothing in the file runs.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up among the allowed ones, and refuse any other."""
        if module == "torch" and re.fullmatch(r"\w+Storage|b?float\d+|u?int\d+|bool", name):
            return name
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(
                f"it holds {module}.{name}; only tensors in plain containers are read, because "
                "unpickling anything else could run code. Save the state dict alone"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Keep a storage's description, ("storage", type, key, device, size)."""
        return pid


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
