"""Read torch checkpoints without torch, and without running what is pickled in them."""

import functools
import io
import json
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

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
# Types of counters and indices (n_averaged, relative_position_index), which are no weights.
_COUNTERS = {"I64", "I32", "BOOL", "LongStorage", "IntStorage", "BoolStorage"}
# Where training tools keep a state dict; an average of the weights before the weights themselves.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
_HOLDERS = ("state_dict", "model", "model_state_dict", "net", "network", "weights")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a checkpoint's tensors by name, in torch's layout, without the batch counters.

    ValueError where it cannot be read, or is not what it says: a file is not trusted.
    """
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
    header = json.loads(data[8:begin], object_pairs_hook=_once_each)
    header.pop("__metadata__", None)
    _check_tiled([entry["data_offsets"] for entry in header.values()], len(data) - begin)
    arrays = {}
    for name, entry in _weights(header).items():
        if any(not isinstance(n, int) or n < 1 for n in entry["shape"]):
            raise ValueError(f"its entry {name!r} has the shape {entry['shape']}")
        if entry["dtype"] in _COUNTERS:
            continue
        first, last = entry["data_offsets"]
        values = np.frombuffer(data[begin + first : begin + last], _dtype(entry["dtype"]))
        arrays[name] = values.reshape(entry["shape"])
    return arrays


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of JSON's pairs, of which the last one would win without a word."""
    if len(named := dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice")
    return named


def _check_tiled(offsets: list[list[int]], size: int) -> None:
    """Raise ValueError unless the tensors fill the file's body, without holes or overlaps."""
    end = 0
    for first, last in sorted(offsets):
        if first != end or last < first:
            raise ValueError(f"its tensors do not lie one after the other: {first} after {end}")
        end = last
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, and there are {size}")


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    """Read a zipped folder with ``data.pkl``, whose tensors point to storages ``data/<key>``."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("parts of it are compressed, which torch never does")
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        state = _Unpickler(io.BytesIO(archive.read(index))).load()
        state = _state_dict(state, path)

        @functools.cache  # tensors may share a storage
        def content(key: str) -> bytes:
            return archive.read(f"{folder}data/{key}")

        arrays = {}
        for name, tensor in _weights(state).items():
            if not isinstance(tensor, _Tensor):
                raise ValueError(f"its entry {name!r} is a {type(tensor).__name__}, not a tensor")
            _, kind, key, _, size = tensor.storage
            if kind not in _COUNTERS:
                values = np.frombuffer(content(key), _dtype(kind), size)
                arrays[name] = _strided(values, tensor)
    return arrays


def _state_dict(state: Any, path: Path) -> dict[str, Any]:
    """Return the innermost state dict of what a training tool has saved."""

    def holds_tensors(value: Any) -> bool:
        return isinstance(value, dict) and any(
            isinstance(v, _Tensor | dict) for v in value.values()
        )

    for _ in range(8):  # a pickle may hold itself
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a state dict")
        inner = [key for key in (*_AVERAGES, *_HOLDERS) if holds_tensors(state.get(key))]
        if not inner:
            return state
        if inner[0] in _AVERAGES:
            logging.getLogger(__name__).info("%s: %s, the averaged weights", path, inner[0])
        state = state[inner[0]]
    raise ValueError("its state dict is in more than eight dicts")


def _weights(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out the batch counters, which nothing reads."""
    if odd := [name for name in state if not isinstance(name, str)]:
        raise ValueError(f"an entry's name is {odd[0]!r}, not a string")
    return {n: entry for n, entry in state.items() if not n.endswith("num_batches_tracked")}


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
    """Hold the description of a pickled tensor; the values are looked up later."""

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
        known = _GLOBALS[module, name]
        # A function of this call alone, for a pickle may set attributes of what it is given.
        return known if isinstance(known, type) else lambda *args: known(*args)

    def persistent_load(self, pid: Any) -> Any:
        """Keep a storage's description, ("storage", type, key, device, size)."""
        return pid
