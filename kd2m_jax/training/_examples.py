"""Check examples before they go to a device: data, batches and evaluation data alike."""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax._outputs import Outputs
from kd2m_jax.losses._checks import are_distributions, integer_labels
from kd2m_jax.losses._metrics import as_outputs
from kd2m_jax.training._body import Batch

# (x, labels) or a dict of the two; x may be a pytree of arrays with one row per example. Labels may
# be None. A third part, or "teacher" of a dict, holds the teacher's outputs.
Arrays: TypeAlias = tuple[Any, Any] | tuple[Any, Any, Any] | Mapping[str, Any]

_INPUTS, _LABELS, _TEACHER = ("image", "x"), ("label", "labels", "y"), "teacher"


def examples(
    what: str, given: Any, classes: int | None = None, *, any_labels: bool = False
) -> Batch:
    """Return inputs, labels and perhaps the teacher's outputs as arrays, checked.

    ValueError or TypeError, which begins with ``what``, for anything but inputs with one row per
    example and labels: ``[n]`` integers from -1 (no label) on, below the number of classes where
    it is known, or ``[n, k]`` distributions over them, or None, which becomes -1. With
    ``any_labels`` they are numbers with one row per example.
    """
    return checked(what, parts(what, given), classes, any_labels=any_labels)


def checked(
    what: str, given: Batch, classes: int | None = None, *, any_labels: bool = False
) -> Batch:
    """Return what `parts` found, checked as `examples` says."""
    x, labels, teacher, _ = given
    if labels is None and any_labels:
        raise ValueError(f"{what} has no labels, and task_loss takes some: zeros, if it needs none")
    if labels is None:
        labels = np.full(check_rows(what, x), -1, np.int32)
    if any_labels:
        _check_numbers(f"{what}: labels", labels)
        if np.ndim(labels) == 0:
            raise ValueError(f"{what}: labels must have a row for each example, got one number")
    elif are_distributions(labels):
        _check_distributions(what, labels, classes)
    else:
        _check_numbered(what, labels)
    check_rows(what, x, len(labels))
    if not any_labels and not are_distributions(labels):
        check_classes(what, labels, classes)
    teacher = None if teacher is None else stored_outputs(what, teacher, len(labels))
    return Batch(x, labels, teacher)


def _check_numbered(what: str, labels: Any) -> None:
    if isinstance(labels, np.ma.MaskedArray) and labels.mask.any():
        raise ValueError(f"{what}: labels are masked, and a mask does not leave examples out")
    if np.ndim(labels) != 1:
        column = np.ndim(labels) == 2 and np.shape(labels)[1] == 1
        hint = "take labels[:, 0]" if column else "one class number per example, no one-hot rows"
        if np.ndim(labels) == 0:
            hint = "this is one example, and not a batch of them"
        raise ValueError(f"{what}: labels must be [n], got {list(np.shape(labels))}: {hint}")
    if len(labels) == 0:
        raise ValueError(f"{what} has no examples")
    try:
        integer_labels(labels)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from error


def _check_distributions(what: str, labels: Any, classes: int | None) -> None:
    if classes is not None and labels.shape[1] != classes:
        raise ValueError(
            f"{what}: labels are distributions over {labels.shape[1]} classes, and the student "
            f"has {classes} logits"
        )
    values = np.asarray(labels, np.float64)
    if len(values) == 0:
        raise ValueError(f"{what} has no examples")
    if not ((values >= 0).all() and np.allclose(values.sum(1), 1, atol=1e-2)):
        raise ValueError(f"{what}: labels [n, k] must be distributions: >= 0, with rows of sum 1")


def check_rows(what: str, x: Any, n: int | None = None) -> int:
    """Return how many rows the inputs have; ValueError where not all have so many (n labels)."""
    if not jax.tree.leaves(x):
        raise ValueError(f"{what} has no inputs")
    for leaf in jax.tree.leaves(x):
        rows = np.shape(leaf)[0] if np.ndim(leaf) else None
        if rows is None or rows != (rows if n is None else n):
            inputs = "inputs without rows" if rows is None else f"{rows} inputs"
            others = "" if n is None else f", but {n} labels"
            raise ValueError(f"{what} has {inputs}{others}")
        n = rows
        _check_numbers(f"{what}: x", leaf)
    if not n:
        raise ValueError(f"{what} has no examples")
    return n


def stored_outputs(what: str, given: Any, n: int) -> Outputs:
    """Return outputs of a teacher that were computed before, checked against n rows."""
    if isinstance(given, Mapping):
        if not given or not set(given) <= set(Outputs._fields):
            raise ValueError(
                f"{what}: the teacher's outputs are features, logits and maps, or some of them, "
                f"got {', '.join(map(str, given))}"
            )
        given = Outputs(**{"features": None, **given})
    out = as_outputs("teacher", given)
    for leaf in jax.tree.leaves(out):
        if np.ndim(leaf) < 2 or np.shape(leaf)[0] != n:
            raise ValueError(
                f"{what} has {n} examples, and the teacher's outputs must have a row for each, got "
                f"shape {list(np.shape(leaf))}"
            )
        if not jnp.issubdtype(dtype_of(leaf), jnp.floating):
            raise TypeError(f"{what}: the teacher's outputs must be floating point")
    return out


def has_labels(labels: Any) -> bool:
    """Tell whether any row has a label."""
    return are_distributions(labels) or bool((np.asarray(labels) != -1).any())


def check_classes(what: str, labels: Any, classes: int | None) -> None:
    """Raise ValueError for labels that are no classes."""
    labels = np.asarray(labels)
    least, largest = int(labels.min()), int(labels.max())
    if least < -1 or (classes is not None and largest >= classes):
        wrong = least if least < -1 else largest
        top = "on" if classes is None else f"to {classes - 1}"
        hint = "" if classes is None else f": the network has {classes} logits"
        raise ValueError(f"{what}: labels must be class numbers from 0 {top}, got {wrong}{hint}")


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


def dtype_of(array: Any) -> Any:
    """Return the dtype that an array will have on a device."""
    known = isinstance(array, np.ndarray | jax.Array)
    return jax.dtypes.canonicalize_dtype(array.dtype if known else np.asarray(array[:0]).dtype)


def parts(what: str, given: Any) -> Batch:
    """Return the inputs, the labels and the teacher's outputs of a tuple, a list or a dict.

    Whatever NumPy reads becomes its array: tensors of other libraries, lists of numbers, images.
    """
    x, labels, teacher = _three(what, given)
    if isinstance(labels, list | tuple):  # of numbers, NumPy's scalars or rows, and never a tree
        labels = _read(what, labels)
    x, labels, teacher = (as_arrays(what, part) for part in (x, labels, teacher))
    if type(x) is list and np.ndim(labels) and len(x) == len(labels):
        shapes = {np.shape(leaf) for leaf in x}
        if len(shapes) == 1 and np.shape(x[0])[:1] != (len(labels),):  # a list of its rows
            x = np.stack(x)
    return Batch(x, labels, teacher)


def is_array(given: Any) -> bool:
    """Tell an array of any library: a table has a shape, too, and columns of several types."""
    return hasattr(given, "shape") and hasattr(given, "dtype")


def as_arrays(what: str, tree: Any) -> Any:
    """Return a tree of NumPy's or JAX's arrays."""
    is_leaf = lambda node: is_array(node) or are_rows(node)  # noqa: E731
    return jax.tree.map(lambda leaf: _read(what, leaf), tree, is_leaf=is_leaf)


def are_rows(node: Any) -> bool:
    """Tell a list that holds rows, and no array, from a pytree of arrays."""
    inside = jax.tree.leaves(node, is_leaf=is_array)
    bare = not any(is_array(a) or isinstance(a, str) for a in inside)
    return type(node) in (list, tuple) and bool(inside) and bare


def _read(what: str, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | jax.Array):
        return leaf
    try:
        return np.asarray(leaf)
    except Exception as error:  # NumPy's, or the other library's
        kind = TypeError if isinstance(error, TypeError) else ValueError
        reason = str(error).split("\n")[0]
        raise kind(f"{what} cannot be read as arrays of equal rows: {reason}") from error


def _three(what: str, given: Any) -> tuple[Any, Any, Any]:
    if isinstance(given, Mapping):
        inputs, labels = ([k for k in names if k in given] for names in (_INPUTS, _LABELS))
        # Labels under an unknown name are a mistake, and no key at all is none.
        unknown = set(given) - {*inputs, *labels, _TEACHER}
        if len(inputs) == 1 and (len(labels) == 1 or not (labels or unknown)):
            found = given[labels[0]] if labels else None
            return given[inputs[0]], found, given.get(_TEACHER)
        raise ValueError(
            f"{what} is a dict of {', '.join(map(str, given))}: it needs one key of "
            f"{'/'.join(_INPUTS)} and one of {'/'.join(_LABELS)}"
        )
    if isinstance(given, list) and all(isinstance(part, tuple | list | dict) for part in given):
        raise ValueError(f"{what} must be (x, labels) arrays, got a list of batches: join them")
    if is_array(given) or not hasattr(given, "__len__") or len(given) not in (2, 3):
        kind = "one array" if is_array(given) else f"a {type(given).__name__}"
        raise ValueError(f"{what} must be (x, labels) or a dict of image and label, got {kind}")
    return given[0], given[1], given[2] if len(given) == 3 else None


def _check_numbers(what: str, x: Any) -> None:
    """Raise an error for what is no number, and for integers that JAX would cut to its width."""
    if isinstance(x, jax.Array):
        return
    x = np.asarray(x)
    if x.dtype.kind in "USO":
        raise TypeError(f"{what} must be numbers, got {x.dtype}")
    if x.dtype.kind not in "iu":
        return
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
    wider = x.dtype.itemsize > limits.bits // 8 and x.size
    if wider and (x.min() < limits.min or x.max() > limits.max):
        raise ValueError(f"{what} has integers that do not fit into {limits.bits} bits")
