"""Networks of somebody else's, unedited: their layers' outputs as features, logits and maps."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx.tracers import current_jax_trace

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Model, Network, Tree, linen_network, mode_of, nnx_network
from kd2m_jax.losses._checks import choice, did_you_mean

POOLS = ("mean", "first")
_INSIDE = object()  # for what a layer gave that belongs to a program inside


def capture(
    module: nnx.Module | nn.Module,
    variables: dict | None = None,
    *,
    features: str,
    logits: str | None = None,
    maps: tuple[str, ...] = (),
    pool: str = "mean",
) -> Network:
    """Make a network of a module that is not written for us: layers' outputs by their paths.

    An NNX layer that is called inside `nnx.scan`, `nnx.jit` or `nnx.remat` cannot be read: what it
    gives belongs to another program. Name the layer around it.

    Args:
      module: an NNX or a Linen module, left as it is. Its call takes x, and ``train``, ``training``
        or ``deterministic`` if its behaviour depends on the mode that way.
      variables: a Linen module's trained variables; an NNX module brings its own.
      features: the path of the layer whose output is matched, ``"encoder.norm"``; a number indexes
        a list, ``"blocks.1"``. Or a key of the dict that the module returns. `layers` prints
        the paths.
      logits: likewise; None for what the module returns.
      maps: paths of layers that give feature maps ``[n, height, width, channels]``.
      pool: how features ``[n, h, w, d]`` or ``[n, t, d]`` become ``[n, d]``: "mean" over space or
        tokens, or "first" for a sequence's first token.

    Returns:
      A `Network`, for `fit`, `outputs` and `predict`. What comes back as the trained student is the
      module itself (or a Linen module's variables), without this wrapping.

    Raises:
      ValueError: an unknown pool, or, when it is first called, a path that leads to no layer (with
        the nearest ones) or an output that is no such array.
      TypeError: what is neither an NNX nor a Linen module.

    Example:
      >>> import jax.numpy as jnp
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.layers = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu)
      ...         self.fc = nnx.Linear(8, 3, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.fc(self.layers(x))
      >>> network = capture(Net(nnx.Rngs(0)), features="layers")
      >>> out, _ = network.apply(*network.variables, jnp.ones((2, 4)), train=False)
      >>> out.features.shape, out.logits.shape
      ((2, 8), (2, 3))
    """
    choice("pool", pool, POOLS)
    maps = (maps,) if isinstance(maps, str) else tuple(maps)
    read = _Read(features, logits, maps, pool, isinstance(module, nn.Module))
    if isinstance(module, nnx.Module):
        return nnx_network(module, read.of_nnx)
    if isinstance(module, nn.Module):
        of_linen = functools.partial(read.of_linen, module)
        return linen_network(module, variables, of_linen, read.layers)
    raise TypeError(f"capture takes an NNX or a Linen module, got {type(module).__name__}")


def layers(module: Model, x: Tree, *, variables: dict | None = None) -> None:
    """Print the paths of a module's layers, and the shapes ``[n, ...]`` of what they give for x.

    Args:
      module: an NNX or a Linen module.
      x: a batch of inputs ``[n, ...]``, of which only shape and dtype count.
      variables: a Linen module's; None draws some.

    Returns:
      Nothing: it prints.

    Raises:
      TypeError: what is neither an NNX nor a Linen module.

    Example:
      >>> import jax.numpy as jnp
      >>> net = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu)
      >>> layers(net, jnp.ones((2, 4)))
      layers.0  Linear  [2, 8]
    """
    if isinstance(module, nnx.Module):
        rows = _nnx_rows(module, x)
    elif isinstance(module, nn.Module):
        rows = _linen_rows(module, variables, x)
    else:
        raise TypeError(f"layers takes an NNX or a Linen module, got {type(module).__name__}")
    wide = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    for path, kind, shape in rows:
        print(f"{path:<{wide[0]}}  {kind:<{wide[1]}}  {shape}".rstrip())


@dataclasses.dataclass(frozen=True)
class _Read:
    """Which outputs are read, and how."""

    features: str
    logits: str | None
    maps: tuple[str, ...]
    pool: str
    linen: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All that is named."""
        return tuple(n for n in (self.features, self.logits, *self.maps) if n is not None)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names as a Linen module has them: a list's members are blocks_0, blocks_1."""
        return tuple(map(_underscored, self.names)) if self.linen else self.names

    def of_nnx(self, module: Any, x: Tree, train: bool) -> Outputs:
        """Call a module of which we have a copy to ourselves."""
        found = {name: node for name in self.names if (node := _at(module, name)) is not None}
        with _recorded(found) as seen:
            returned = module(x, **mode_of(module, train=train))
        silent = found.keys() - seen.keys()
        if silent:
            raise ValueError(f"the layer {min(silent)!r} is not called, so it gives no output")
        if inside := [name for name, out in seen.items() if out is _INSIDE]:
            raise ValueError(
                f"the layer {inside[0]!r} is called inside nnx.scan, nnx.jit or nnx.remat, where "
                "it cannot be read: name the layer around it"
            )
        return self._outputs(returned, seen, lambda: [p for p, _ in _nnx_layers(module)], x)

    def of_linen(self, module: Any, returned: Any, variables: Mapping, x: Tree) -> Outputs:
        """Read what a Linen module returned and its intermediates."""
        held = dict(_flat(variables.get("intermediates", {})))
        seen = {n: held[_underscored(n)] for n in self.names if _underscored(n) in held}
        # Only what was asked for is captured: the paths to choose from take a call of their own.
        return self._outputs(
            returned, seen, lambda: [path for path, *_ in _linen_rows(module, None, x)], x
        )

    def _outputs(self, returned: Any, seen: dict[str, Any], paths, x: Tree) -> Outputs:
        named = {**(returned if isinstance(returned, Mapping) else {}), **seen}

        def one(name: str) -> Any:
            if name not in named:
                keys = list(map(str, returned)) if isinstance(returned, Mapping) else []
                known = keys + paths()
                hint = did_you_mean(name, known) if known else "kd2m_jax.layers prints the paths"
                raise ValueError(f"the module has no layer {name!r}: {hint}")
            return named[name]

        logits: Any = returned if self.logits is None else one(self.logits)
        if getattr(logits, "ndim", 0) != 2:
            what = "what the module returns" if self.logits is None else f"{self.logits!r}"
            raise ValueError(f"logits must be [n, k], and {what} is {_shape(logits)}")
        maps = tuple(one(name) for name in self.maps)
        for name, array in zip(self.maps, maps, strict=True):
            if getattr(array, "ndim", 0) != 4:
                raise ValueError(f"maps must be [n, h, w, c], and {name!r} is {_shape(array)}")
        rows = len(jax.tree.leaves(x)[0])
        for name, array in (
            (self.features, one(self.features)),
            *zip(self.maps, maps, strict=True),
        ):
            if getattr(array, "ndim", 0) and len(array) != rows:
                raise ValueError(
                    f"{name!r} gives {_shape(array)} for {rows} rows: the first axis must be the "
                    "batch"
                )
        return Outputs(_pooled(self.features, one(self.features), self.pool), logits, maps)


def _pooled(name: str, z: Any, pool: str) -> jax.Array:
    dimensions = getattr(z, "ndim", 0)
    if dimensions == 2:
        return z
    if dimensions == 3:
        return z[:, 0] if pool == "first" else jnp.mean(z, axis=1)
    if dimensions == 4 and pool == "mean":
        return jnp.mean(z, axis=(1, 2))
    wanted = "[n, t, d]" if pool == "first" else "[n, d], [n, t, d] or [n, h, w, d]"
    raise ValueError(f"features (pool={pool!r}) must be {wanted}, and {name!r} is {_shape(z)}")


def _shape(thing: Any) -> str:
    if isinstance(thing, Mapping):
        return f"a dict of {', '.join(map(str, thing))}"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {', '.join(map(_shape, thing))}"
    return str(list(thing.shape)) if hasattr(thing, "shape") else f"a {type(thing).__name__}"


# --- NNX ---------------------------------------------------------------------------------------


def _at(module: Any, path: str) -> Any:
    """Return the layer at a path, or None."""
    node: Any = module
    for part in path.split("."):
        if part.lstrip("-").isdigit() and not hasattr(node, part):
            try:
                node = node[int(part)]
            except (TypeError, IndexError, KeyError):
                return None
        elif isinstance(node, Mapping):
            node = node.get(part)
        else:
            node = getattr(node, part, None)
    return node if isinstance(node, nnx.Module) else None


@contextlib.contextmanager
def _recorded(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep the last output of these layers while they are called.

    Their class is another one meanwhile: Python looks a call up in the class alone, and flax has
    nothing for this before 0.12 (``nnx.capture``).
    """
    seen: dict[str, Any] = {}
    own, outer = {name: type(node) for name, node in found.items()}, current_jax_trace()

    def recording(name: str, cls: type) -> type:
        def call(self, *args, **options):
            out = cls.__call__(self, *args, **options)
            seen[name] = out if current_jax_trace() == outer else _INSIDE
            return out

        return type(cls.__name__, (cls,), {"__call__": call})

    names = {id(node): name for name, node in found.items()}
    try:
        for node, name in ((found[n], n) for n in names.values()):
            node.__class__ = recording(name, own[name])
        yield seen
    finally:
        for name in names.values():
            found[name].__class__ = own[name]
        for name, node in found.items():  # two paths of one layer
            if names[id(node)] in seen:
                seen[name] = seen[names[id(node)]]


def _nnx_layers(module: nnx.Module) -> list[tuple[str, Any]]:
    """Return every layer below a module with its path, in the order of the paths."""
    pairs = ((".".join(map(str, path)), node) for path, node in nnx.iter_graph(module))
    return sorted((p, node) for p, node in pairs if p and isinstance(node, nnx.Module))


def _nnx_rows(module: nnx.Module, x: Tree) -> list[tuple[str, str, str]]:
    kinds: dict[str, str] = {}

    def call(x):
        copy = nnx.clone(module)
        copy.eval()
        found = dict(_nnx_layers(copy))
        kinds.update({path: type(node).__name__ for path, node in found.items()})
        with _recorded(found) as seen:
            copy(x, **mode_of(copy, train=False))
        return {path: out for path, out in seen.items() if hasattr(out, "shape")}

    shapes = jax.eval_shape(call, jax.tree.map(jnp.asarray, x))
    return [(p, kind, _shape(shapes[p])) for p, kind in kinds.items() if p in shapes]


# --- Linen -------------------------------------------------------------------------------------


def _underscored(path: str) -> str:
    return re.sub(r"\.(\d+)(?=\.|$)", r"_\1", path)


def _flat(tree: Mapping, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if name == "__call__":
            yield above, value[-1]  # the last of several calls
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{above}.{name}" if above else name)


def _linen_rows(module: nn.Module, variables, x) -> list[tuple[str, str, str]]:
    def call(x):
        mode = mode_of(module, train=False)
        known = variables or module.init(jax.random.key(0), x, **mode)
        options = {"capture_intermediates": True, "mutable": ["intermediates"]}
        _, seen = module.apply(known, x, **mode, **options)
        outs = dict(_flat(seen["intermediates"]))
        return {path: out for path, out in outs.items() if path and hasattr(out, "shape")}

    shapes = jax.eval_shape(call, jax.tree.map(jnp.asarray, x))
    return [(path, "", _shape(out)) for path, out in shapes.items()]
