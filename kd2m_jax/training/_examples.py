"""What is asked of examples before they go to a device: data, batches and evaluation data alike."""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax.losses._checks import integer_labels

# (x, labels) or a dict of the two; x may be a pytree of arrays with one row an example.
Arrays: TypeAlias = tuple[Any, Any] | Mapping[str, Any]

_INPUTS, _LABELS = ("image", "x"), ("label", "labels", "y")


def examples(what: str, given: Any, classes: int | None = None) -> tuple[Any, Any]:
    """Return ``(x, labels)``; ValueError or TypeError, named after ``what``, for what is no such.

    Labels come as JAX's integers ``[n]`` (on the host where they were there), at least 0 and, where
    that is known, below the number of classes. ``x`` comes as it is.
    """
    x, labels = _pair(what, given)
    labels = labels if hasattr(labels, "shape") else np.asarray(labels)
    if np.ndim(labels) != 1:
        column = np.ndim(labels) == 2 and np.shape(labels)[1] == 1
        hint = "take labels[:, 0]" if column else "one class number an example, no one-hot rows"
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
        _check_width(what, leaf)
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
    needed = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(x))
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
    return array if isinstance(array, jax.Array) else jnp.asarray(np.array(array))


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
    if isinstance(given, list) and any(isinstance(part, tuple | dict) for part in given):
        raise ValueError(f"{what} must be (x, labels) arrays, got a list of batches")
    if hasattr(given, "shape") or not hasattr(given, "__len__") or len(given) != 2:
        kind = "one array" if hasattr(given, "shape") else f"a {type(given).__name__}"
        raise ValueError(f"{what} must be (x, labels) or a dict of image and label, got {kind}")
    return given[0], given[1]


def _check_width(what: str, x: Any) -> None:
    """Raise ValueError for integers that JAX would cut to its own width."""
    if isinstance(x, jax.Array) or np.asarray(x).dtype.kind not in "iu":
        return
    x = np.asarray(x)
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
    wider = x.dtype.itemsize > limits.bits // 8 and x.size
    if wider and (x.min() < limits.min or x.max() > limits.max):
        raise ValueError(f"{what}: x has integers that do not fit into {limits.bits} bits")
