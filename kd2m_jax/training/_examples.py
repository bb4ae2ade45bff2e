"""Check examples before they go to a device: data, batches and evaluation data alike."""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax.losses._checks import integer_labels

# (x, labels) or a dict of the two; x may be a pytree of arrays with one row per example.
Arrays: TypeAlias = tuple[Any, Any] | Mapping[str, Any]

_INPUTS, _LABELS = ("image", "x"), ("label", "labels", "y")


def examples(what: str, given: Any, classes: int | None = None) -> tuple[Any, Any]:
    """Return ``(x, labels)`` as they are, checked.

    ValueError or TypeError, which begins with ``what``, for anything but inputs with one row per
    example and labels ``[n]`` of integers from 0 on, below the number of classes where it is known.
    """
    x, labels = _pair(what, given)
    labels = labels if hasattr(labels, "shape") else np.asarray(labels)
    if isinstance(labels, np.ma.MaskedArray) and labels.mask.any():
        raise ValueError(f"{what}: labels are masked, and a mask does not leave examples out")
    if np.ndim(labels) != 1:
        column = np.ndim(labels) == 2 and np.shape(labels)[1] == 1
        hint = "take labels[:, 0]" if column else "one class number per example, no one-hot rows"
        raise ValueError(f"{what}: labels must be [n], got {list(np.shape(labels))}: {hint}")
    if len(labels) == 0:
        raise ValueError(f"{what} has no examples")
    try:
        integer_labels(labels)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from error
    for leaf in jax.tree.leaves(x):
        rows = np.shape(leaf)[0] if np.ndim(leaf) else None
        if rows != len(labels):
            inputs = "inputs without rows" if rows is None else f"{rows} inputs"
            raise ValueError(f"{what} has {inputs}, but {len(labels)} labels")
        _check_numbers(what, leaf)
    if not jax.tree.leaves(x):
        raise ValueError(f"{what} has no inputs")
    check_classes(what, labels, classes)
    return x, labels


def check_classes(what: str, labels: Any, classes: int | None) -> None:
    """Raise ValueError for labels that are no classes."""
    labels = np.asarray(labels)
    least, largest = int(labels.min()), int(labels.max())
    if least < 0 or (classes is not None and largest >= classes):
        wrong = least if least < 0 else largest
        top = "on" if classes is None else f"to {classes - 1}"
        raise ValueError(f"{what}: labels must be class numbers from 0 {top}, got {wrong}")


def check_memory(what: str, x: Any, device: Any) -> None:
    """Raise ValueError for arrays that the device cannot hold, before anything is copied."""
    needed = 0
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, np.ndarray | jax.Array):
            needed += leaf.size * dtype_of(leaf).itemsize
    there = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if there is not None and needed > there:
        raise ValueError(
            f"{what} takes {needed / 2**30:,.1f} GiB, and {device.device_kind} has "
            f"{there / 2**30:,.1f}: give an iterable of batches"
        )


def on_device(array: Any) -> jax.Array:
    """Return an array that JAX alone holds: a loader may write its next batch into this one's."""
    own = jnp.array if isinstance(array, jax.Array) else np.array  # both copy
    return jnp.asarray(own(array))


def dtype_of(array: Any) -> Any:
    """Return the dtype that an array will have on a device."""
    known = isinstance(array, np.ndarray | jax.Array)
    return jax.dtypes.canonicalize_dtype(array.dtype if known else np.asarray(array[:0]).dtype)


def _pair(what: str, given: Any) -> tuple[Any, Any]:
    """Return the inputs and the labels of a tuple, a list or a dict of the two."""
    if isinstance(given, Mapping):
        found = [[k for k in names if k in given] for names in (_INPUTS, _LABELS)]
        if [len(keys) for keys in found] == [1, 1]:
            return given[found[0][0]], given[found[1][0]]
        raise ValueError(
            f"{what} is a dict of {', '.join(map(str, given))}: it needs one key of "
            f"{'/'.join(_INPUTS)} and one of {'/'.join(_LABELS)}"
        )
    if isinstance(given, list) and all(isinstance(part, tuple | list | dict) for part in given):
        raise ValueError(f"{what} must be (x, labels) arrays, got a list of batches: join them")
    if hasattr(given, "shape") or not hasattr(given, "__len__") or len(given) != 2:
        kind = "one array" if hasattr(given, "shape") else f"a {type(given).__name__}"
        raise ValueError(f"{what} must be (x, labels) or a dict of image and label, got {kind}")
    return given[0], given[1]


def _check_numbers(what: str, x: Any) -> None:
    """Raise an error for what is no number, and for integers that JAX would cut to its width."""
    if isinstance(x, jax.Array):
        return
    x = np.asarray(x)
    if x.dtype.kind in "USO":
        raise TypeError(f"{what}: x must be numbers, got {x.dtype}")
    if x.dtype.kind not in "iu":
        return
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
    wider = x.dtype.itemsize > limits.bits // 8 and x.size
    if wider and (x.min() < limits.min or x.max() > limits.max):
        raise ValueError(f"{what}: x has integers that do not fit into {limits.bits} bits")
