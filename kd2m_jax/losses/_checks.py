"""What every public loss does before its mathematics: compile, check shapes, promote dtypes."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

F = TypeVar("F", bound=Callable)
T = TypeVar("T")

# Traced although keyword-only; every other keyword-only parameter of a loss is static.
TRACED = ("key", "class_cost", "where", "labels_t")
# Keyword-only parameters that belong to one call: no options of a metric.
PER_CALL = ("key", "where", "labels_t", "has_aux")


def loss(fn: F) -> F:
    """Compile a loss with its options (keyword-only parameters) static.

    A plain function around the compiled one, so that ``help`` and doctest see a function.
    """
    options = [
        name
        for name, p in inspect.signature(fn).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name not in TRACED
    ]

    positions = list(inspect.signature(fn).parameters)

    @functools.wraps(fn)
    def on_whole_arrays(*args, **kwargs):
        chosen = {name: value for name, value in kwargs.items() if name in options}
        arrays = {name: value for name, value in kwargs.items() if name not in options}
        args, arrays = jax.tree.map(replicated, (args, arrays))
        return fn(*args, **arrays, **chosen)

    compiled = jax.jit(on_whole_arrays, static_argnames=options)

    @functools.wraps(fn)
    def call(*args, **kwargs):
        kwargs |= {name: static(name, kwargs[name]) for name in options if name in kwargs}
        if "labels" in positions:  # before JAX narrows what NumPy holds
            at = positions.index("labels")
            if at < len(args):
                args = (*args[:at], integer_labels(args[at]), *args[at + 1 :])
            elif kwargs.get("labels") is not None:
                kwargs["labels"] = integer_labels(kwargs["labels"])
        if kwargs.get("labels_t") is not None:
            kwargs["labels_t"] = integer_labels(kwargs["labels_t"])
        with jax.numpy_dtype_promotion("standard"):  # ott-jax relies on it, whatever the caller set
            return compiled(*args, **kwargs)

    return call  # type: ignore[return-value]


def replicated(x: ArrayLike) -> jax.Array:
    """Return the whole array on every device of an explicit mesh; any other array as it is.

    A loss compares all rows with all rows, so whatever axis the batch is split along, it needs
    them together. Explicit meshes leave that choice to the program.
    """
    x = jnp.asarray(x)
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.explicit_axes:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def varies(x: jax.Array) -> bool:
    """Return whether an array differs over the devices of a shard_map with its default checks."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # jax >= 0.10; before, the set itself
    return bool(kind.vma if manual is None else manual.varying)


def varying(tree: T, like: jax.Array) -> T:
    """Type constants as what a loop or a branch computes from ``like``, for `jax.shard_map`.

    Its default checks tell apart what varies over a mesh axis from what does not, and a loop must
    start with the types that it ends with. XLA removes the choice between two equal values.
    """
    if not varies(like):
        return tree
    never = jnp.zeros_like(like, shape=(), dtype=bool)  # varies as ``like`` does
    return jax.tree.map(lambda x: jnp.where(never, x, x), tree)


def static(name: str, value: Any) -> Any:
    """Return an option as Python has it: arrays of one number as numbers, others as tuples."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} is a static option: pass a Python number, not a traced one")
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(static(name, item) for item in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    # JAX takes no integer of more than 64 bits.
    return float(value) if whole and 2**31 <= abs(value) < 2**1023 else value


def shown(value: Any) -> str:
    """Return a value in an error message, however long it is."""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:30]}... ({len(text)} characters)"


def number(name: str, value: float, *, positive: bool = True) -> float:
    """Raise ValueError unless value is a positive (or, on request, non-negative) finite number.

    It must be one that float32 holds, or an infinity or a zero would take its place unseen.
    """
    numeric = isinstance(value, int | float | np.number | str) and not isinstance(value, bool)
    if not numeric or value == float("inf"):
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")
    if isinstance(value, str) or not (value > 0 or (not positive and value == 0)):
        raise ValueError(f"{name} must be {'> 0' if positive else '>= 0'}, got {shown(value)}")
    limits = np.finfo(np.float32)
    if value != 0 and not float(limits.tiny) <= value <= float(limits.max):
        raise ValueError(
            f"{name} must be a number that float32 holds, {limits.tiny:.1e} to {limits.max:.1e}, "
            f"got {shown(value)}"
        )
    return value


def flag(name: str, value: bool) -> bool:
    """Raise ValueError unless value is True or False: any other word would count as true."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return bool(value)


def integer(name: str, value: int) -> int:
    """Raise ValueError unless value is an integer >= 1."""
    numeric = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not numeric or value % 1 != 0 or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {shown(value)}")
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2^31, got {shown(value)}")
    return int(value)


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Raise ValueError, with the nearest allowed name, unless value is one of them."""
    if value not in allowed:
        raise ValueError(f"unknown {name} {shown(repr(value))}: {did_you_mean(value, allowed)}")
    return value


def did_you_mean(name: str, allowed) -> str:
    """Half a sentence that leads from a wrong name to the right ones."""
    import difflib

    near = difflib.get_close_matches(str(name)[:60], list(allowed), n=3, cutoff=0.5)
    known = f"known are {', '.join(allowed)}"
    return f"did you mean {' or '.join(near)}? ({known})" if near else known


def matrix(name: str, x: ArrayLike) -> jax.Array:
    """Return a float ``[n, d]`` array, in float32 unless it comes in float64."""
    x = jnp.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must be a non-empty [n, d] array, got shape {list(x.shape)}")
    return floating(name, x)


def floating(name: str, x: ArrayLike) -> jax.Array:
    """Return a float array, in float32 unless it comes in float64: half precision only stores."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must hold floating-point numbers, got {x.dtype}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def clouds(
    z_s: ArrayLike, z_t: ArrayLike, *, paired: bool = False, one_space: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Two point clouds in ``one_space``; ``paired`` ones are rows of the same batch as well."""
    z_s, z_t = matrix("z_s", z_s), matrix("z_t", z_t)
    if one_space and z_s.shape[1] != z_t.shape[1]:
        raise ValueError(
            f"z_s has {z_s.shape[1]} features and z_t has {z_t.shape[1]}, but this distance needs "
            "one space: map the student into the teacher's with kd2m_jax.projected, or use "
            "losses.gw2, which compares clouds of unequal feature sizes"
        )
    if paired and z_s.shape[0] != z_t.shape[0]:
        raise ValueError(
            f"z_s has {z_s.shape[0]} rows and z_t has {z_t.shape[0]}: here row i of both must be "
            "the same example"
        )
    dtype = jnp.promote_types(z_s.dtype, z_t.dtype)
    return z_s.astype(dtype), z_t.astype(dtype)


def kept_rows(where: ArrayLike | None, n: int, m: int) -> jax.Array | None:
    """Return which rows of both sides count, ``[n]`` bool, or None for all."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise TypeError(f"where must hold True or False, got {where.dtype}")
    if n != m:
        raise ValueError(
            f"where leaves row i of both sides out, so it needs as many rows of each, got {n} of "
            f"the student and {m} of the teacher"
        )
    if where.shape != (n,):
        raise ValueError(f"where must have shape [{n}], got {list(where.shape)}")
    return where


def labelled_rows(
    labels: ArrayLike, where: ArrayLike | None, n: int
) -> tuple[jax.Array, jax.Array]:
    """Return integer labels ``[n]``, and which rows count: those of -1 have no class."""
    labels = class_labels(labels, n)
    keep, known = kept_rows(where, n, n), labels != -1
    return labels, known if keep is None else known & keep


def apart_labels(
    labels: ArrayLike, labels_t: ArrayLike, where: ArrayLike | None, n: int, m: int
) -> tuple[jax.Array, jax.Array]:
    """Return the integer labels of both sides, each of which has examples of its own."""
    if where is not None:
        raise ValueError(
            "where leaves row i of both sides out, and with labels_t they are not the same "
            "examples: give the rows the label -1 instead"
        )
    return class_labels(labels, n), class_labels(labels_t, m, "labels_t")


def filled(keep: jax.Array | None, *arrays: jax.Array) -> list[jax.Array]:
    """Put the mean of the rows that count, a constant, into the places of the others.

    There they move no mean and raise no maximum, and a NaN in them is gone.
    """
    if keep is None:
        return list(arrays)
    count = jnp.maximum(jnp.sum(keep), 1)
    means = [jnp.sum(a, axis=0, keepdims=True) / count for a in emptied(keep, *arrays)]
    column = keep[:, None]
    return [
        jnp.where(column, a, jax.lax.stop_gradient(mean).astype(a.dtype))
        for a, mean in zip(arrays, means, strict=True)
    ]


def emptied(keep: jax.Array | None, *arrays: jax.Array) -> list[jax.Array]:
    """Put zeros into the places of the rows that do not count."""
    if keep is None:
        return list(arrays)
    return [jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, 0) for a in arrays]


def row_mean(per_row: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Return the mean over the rows that count; 0 without any."""
    if keep is None:
        return jnp.mean(per_row)
    (per_row,) = emptied(keep, per_row)
    return jnp.sum(per_row) / jnp.maximum(jnp.sum(keep, dtype=per_row.dtype), 1)


def class_labels(labels: ArrayLike, n: int, name: str = "labels") -> jax.Array:
    """Integer labels ``[n]``."""
    labels = integer_labels(labels)
    if labels.shape != (n,):
        raise ValueError(
            f"{name} must have shape [{n}], got {list(labels.shape)}{_as_numbers(labels.shape)}"
        )
    return labels


def integer_labels(labels: ArrayLike) -> jax.Array:
    """Labels of any shape as JAX's integers, refused where JAX would change their values."""
    held_by_jax = isinstance(labels, jax.Array) or hasattr(labels, "__jax_array__")
    labels = jnp.asarray(labels) if held_by_jax else np.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        # astype(int) would make classes of fractions, so it is no advice for them.
        hint = _as_numbers(labels.shape) or ": class numbers are whole, make them so by astype(int)"
        if labels.dtype.kind in "USO":
            hint = ": numbers of names by np.unique(labels, return_inverse=True)[1]"
        if isinstance(labels, np.ndarray) and labels.dtype.kind == "f" and np.any(labels % 1 != 0):
            hint = ": distributions over classes are [n, k]" + _as_numbers(labels.shape)
        raise TypeError(f"labels must be integers, got {labels.dtype}{hint}")
    limits = jnp.iinfo(jax.dtypes.canonicalize_dtype(labels.dtype))
    if isinstance(labels, np.ndarray) and labels.size:
        least, largest = labels.min(), labels.max()
        if least < limits.min or largest > limits.max:
            raise ValueError(
                f"labels from {least} to {largest} do not fit into {limits.bits} bits: number the "
                "data set's classes from 0 (numpy.unique(labels, return_inverse=True)[1])"
            )
    labels = jnp.asarray(labels)
    # Signed, because -1 means that there is none.
    return labels.astype(jnp.promote_types(labels.dtype, jnp.int32))


def are_distributions(labels: ArrayLike) -> bool:
    """Tell labels that are distributions over k >= 2 classes, ``[n, k]``, from class numbers."""
    if np.ndim(labels) != 2 or np.shape(labels)[1] < 2:
        return False
    dtype = getattr(labels, "dtype", None)
    return jnp.issubdtype(np.asarray(labels).dtype if dtype is None else dtype, jnp.floating)


def _as_numbers(shape: tuple[int, ...]) -> str:
    """How labels of two axes become numbers: a column is one already, one-hot rows are not."""
    if len(shape) != 2:
        return ""
    return ": take labels[:, 0]" if shape[1] == 1 else ": one-hot rows by labels.argmax(-1)"


def several_classes(what: str, k: int) -> None:
    """Raise ValueError where a softmax has nothing to choose between: it is 1 for every input."""
    if k < 2:
        raise ValueError(
            f"{what} compares probabilities over classes, so it needs k >= 2 logits, got {k}: for "
            "one logit h give [0, h]"
        )


def paired_logits(
    logits_s: ArrayLike, logits_t: ArrayLike, *, paired: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Logits of student and teacher over the same classes; ``paired`` ones row by row as well."""
    logits_s, logits_t = matrix("logits_s", logits_s), matrix("logits_t", logits_t)
    if logits_s.shape[1] != logits_t.shape[1]:
        raise ValueError(
            f"logits_s has {logits_s.shape[1]} classes and logits_t has {logits_t.shape[1]}: "
            "student and teacher must predict the same classes"
        )
    if paired and logits_s.shape[0] != logits_t.shape[0]:
        raise ValueError(
            f"logits_s has {logits_s.shape[0]} rows and logits_t has {logits_t.shape[0]}: here row "
            "i of both must be the same example"
        )
    dtype = jnp.promote_types(logits_s.dtype, logits_t.dtype)
    return logits_s.astype(dtype), logits_t.astype(dtype)


Maps = ArrayLike | Sequence[ArrayLike]  # one stage's feature maps, or several stages', first first


def stage_maps(maps_s: Maps, maps_t: Maps, stage: int) -> tuple[jax.Array, jax.Array]:
    """One stage's maps ``[n, h, w, c]`` of student and teacher; h, w and c may differ."""
    pair = []
    for name, maps in (("maps_s", maps_s), ("maps_t", maps_t)):
        stages = tuple(maps) if isinstance(maps, (tuple, list)) else (maps,)
        if not -len(stages) <= stage < len(stages):
            raise ValueError(
                f"{name} has {len(stages)} stages, so there is no stage {shown(stage)}"
            )
        x = jnp.asarray(stages[stage])
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must hold non-empty [n, height, width, channels] arrays, got shape "
                f"{list(x.shape)}"
            )
        pair.append(floating(name, x))
    if pair[0].shape[0] != pair[1].shape[0]:
        raise ValueError(
            f"maps_s has {pair[0].shape[0]} rows and maps_t has {pair[1].shape[0]}: here row i of "
            "both must be the same example"
        )
    dtype = jnp.promote_types(pair[0].dtype, pair[1].dtype)
    return pair[0].astype(dtype), pair[1].astype(dtype)
