"""Reading a trained student back from its checkpoint folder."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kd2m_jax._locks import check_local
from kd2m_jax.adapters import Model, Tree, as_network
from kd2m_jax.errors import CheckpointError
from kd2m_jax.training._fit import N

# Where a saved pytree has a student's parameters and state.
_PLACES = {"last": ("params", "model_state"), "best": ("0", "1")}


@overload
def restore(
    checkpoint_dir: str | os.PathLike, model: N, which: Literal["last", "best"] = "last"
) -> N: ...
@overload
def restore(
    checkpoint_dir: str | os.PathLike, model: Sequence[N], which: Literal["last", "best"] = "last"
) -> list[N]: ...
@overload
def restore(
    checkpoint_dir: str | os.PathLike,
    model: Model | Sequence[Model],
    which: Literal["last", "best"] = "last",
) -> Tree: ...
def restore(
    checkpoint_dir: str | os.PathLike,
    model: Model | Sequence[Model],
    which: Literal["last", "best"] = "last",
) -> Tree:
    """Read a student back that `fit` saved.

    Args:
      checkpoint_dir: the folder that `fit` got under this name.
      model: a module of the same structure as the student: an NNX or Linen module, without
        `projected`, or a `Network` whose ``init`` needs no inputs. A list of them for a
        population. It is left as it is.
      which: "last" for what `FitResult.student` is, "best" for what `FitResult.best` is.

    Returns:
      An NNX module in evaluation mode for an NNX module, the dict of variables for a Linen one,
      the pair ``(params, state)`` for a `Network`; a list of them for a list.

    Raises:
      ValueError: ``which`` is neither of the two.
      CheckpointError: no checkpoint in the folder can be read, or it is of another network or
        another number of students.
      TypeError: a model that is none of the three kinds.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import fit, models
      >>> net = models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0))
      >>> x, labels = jnp.ones((8, 4)), jnp.zeros(8, int)
      >>> options = {"epochs": 1, "batch_size": 8}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     trained = fit(net, (x, labels), checkpoint_dir=folder, **options).student
      ...     again = restore(folder, net)
      >>> bool((again(x).logits == trained(x).logits).all())
      True
    """
    from kd2m_jax.training._checkpoints import Checkpoints  # orbax takes a second

    if which not in _PLACES:
        raise ValueError(f"which must be 'last' or 'best', got {which!r}")
    check_local(checkpoint_dir)
    if not os.path.isdir(checkpoint_dir):
        raise CheckpointError(f"there is no folder {os.fspath(checkpoint_dir)}")
    with contextlib.closing(Checkpoints(checkpoint_dir, writing=False)) as checkpoints:
        read = checkpoints.arrays(best=which == "best")
    if read is None:
        raise CheckpointError(f"no checkpoint in {os.fspath(checkpoint_dir)} can be read")
    arrays, record = read
    places = _PLACES[which]
    if which == "last" and record["settings"].get("weight_average") is not None:
        places = ("average/0", "average/1")
    several = type(model) in (list, tuple)  # exactly: a Network is a NamedTuple
    models: Any = model if several else [model]
    saved = {name.split("/")[0] for name in arrays}
    if len(saved) != len(models):
        raise CheckpointError(
            f"{os.fspath(checkpoint_dir)} holds {len(saved)} students, and there are "
            f"{len(models)} models"
        )
    found = [_student(one, i, arrays, places) for i, one in enumerate(models)]
    return found if several else found[0]


def _student(model: Model, number: int, arrays: dict[str, np.ndarray], places) -> Any:
    """Return a trained student of a population, or the only one."""
    network, parts = as_network(model), []
    for place in places:
        prefix = f"{number}/{place}/"
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        if place.startswith("average"):  # in float32 at least, and the student need not be
            trained = f"{number}/{_PLACES['last'][int(place[-1])]}/"
            own = {k: v.astype(arrays[trained + k].dtype) for k, v in own.items()}
        parts.append(own)
    if isinstance(model, nn.Module):
        # Its variables are nested dicts: the names say it all. A projector's come second.
        inner = all(k.split("/")[0] in ("0", "1") for k in parts[0])
        return network.export(*(_nested(_inner(part) if inner else part) for part in parts))
    try:
        like = network.init(jax.random.key(0), None)
    except Exception as error:
        # A Linen module inside, whose names say it all.
        with contextlib.suppress(Exception):
            found = network.export(*(_nested(part) for part in parts))
            if isinstance(found, dict) and "params" in found:
                return found
        raise CheckpointError(
            "restore takes the student's own module, without projected(), or a Network whose init "
            f"needs no inputs; this one's raised {type(error).__name__}: {error}"
        ) from error
    wanted = [jax.tree_util.tree_flatten_with_path(tree) for tree in like]
    for saved in (parts, [_inner(part) for part in parts]):
        trees = [_filled(pairs, part) for pairs, part in zip(wanted, saved, strict=True)]
        if None not in trees:
            return network.export(*trees)
    raise CheckpointError(f"the checkpoint is of another network than this {type(model).__name__}")


def _inner(part: dict[str, Any]) -> dict[str, Any]:
    """Return what a projected student's variables hold of the student itself."""
    return {k.removeprefix("0/"): v for k, v in part.items() if k.startswith("0/")}


def _nested(part: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in part.items():
        *above, last = name.split("/")
        at = nested
        for key in above:
            at = at.setdefault(key, {})
        at[last] = jnp.asarray(value)
    return nested


def _filled(wanted, part: dict[str, Any]) -> Any:
    """Return a pytree with the saved arrays, or None where names or shapes differ."""
    pairs, structure = wanted
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in pairs}
    if named.keys() != part.keys():
        return None
    leaves = []
    for name, like in named.items():
        new = part[name]
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            new = jax.random.wrap_key_data(jnp.asarray(new))
        if (new.shape, new.dtype) != (like.shape, like.dtype):
            return None
        leaves.append(jnp.asarray(new))
    return jax.tree.unflatten(structure, leaves)
