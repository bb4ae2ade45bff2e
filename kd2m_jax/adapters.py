"""One functional protocol for Flax NNX and Linen networks, so that a step can mix them."""

import functools
import inspect
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd2m_jax._batch_norm import DEVICES, on_devices, synchronise
from kd2m_jax._outputs import Outputs

__all__ = ["Network", "from_linen", "from_nnx"]

# What a network's parameters or its state are: any pytree of arrays.
Tree: TypeAlias = Any


class Apply(Protocol):
    """The signature of `Network.apply`."""

    def __call__(
        self, params: Tree, state: Tree, x: Tree, /, *, train: bool, rng: jax.Array | None = None
    ) -> tuple[Outputs, Tree]:
        """Return the outputs of a batch, and the state after it."""
        ...


def _pair(params, state):
    return params, state


class Network(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: ``(key, x) -> (params, state)``: what the optimizer updates, and what the network
        itself does (batch statistics). ``x`` is a batch of inputs, of which only the shape and
        dtype count.
      apply: ``(params, state, x, *, train, rng) -> (Outputs, new_state)``. ``rng`` feeds
        dropout and may be None where ``train`` is False.
      export: ``(params, state) -> model``, the trained model as its users know it: an NNX module
        in evaluation mode, a Linen module's variables, or by default the pair itself.
      variables: ``(params, state)``, trained, where the network brings them: a teacher's need not
        be given then.

    Example:
      >>> import jax.numpy as jnp
      >>> def init(key, x):
      ...     return {"hidden": jnp.ones((x.shape[1], 8)), "head": jnp.ones((8, 3))}, {}
      >>> def apply(params, state, x, *, train, rng):
      ...     features = x @ params["hidden"]
      ...     return Outputs(features, features @ params["head"]), state
      >>> network, x = Network(init, apply), jnp.ones((2, 4))
      >>> params, state = network.init(None, x)
      >>> network.apply(params, state, x, train=False, rng=None)[0].logits.shape
      (2, 3)
    """

    init: Callable[[jax.Array | None, Tree], tuple[Tree, Tree]]
    apply: Apply
    export: Callable[[Tree, Tree], Any] = _pair
    variables: tuple[Tree, Tree] | None = None


Model: TypeAlias = nnx.Module | nn.Module | Network


def from_nnx(module: nnx.Module) -> Network:
    """Wrap a Flax NNX module, which stays as it is: the network works on a copy.

    The module's ``__call__(x)`` returns `Outputs`, or the tuple ``(features, logits)`` or
    ``(features, logits, maps)``. ``train()`` and ``eval()`` set its mode, dropout draws from the
    step's key, and BatchNorm is synchronised over devices without being told to.

    Args:
      module: an initialised (or trained) module.

    Returns:
      A `Network` whose ``init`` returns the module's own parameters and state: an NNX module
      is born initialised, so the key is not used.

    Raises:
      TypeError: when the module is not NNX, or at its first call, when it returns anything else.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> class Tiny(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.hidden = nnx.Linear(4, 8, rngs=rngs)
      ...         self.head = nnx.Linear(8, 3, rngs=rngs)
      ...     def __call__(self, x):
      ...         features = nnx.relu(self.hidden(x))
      ...         return features, self.head(features)
      >>> network = from_nnx(Tiny(nnx.Rngs(0)))
      >>> params, state = network.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> out, state = network.apply(params, state, jnp.ones((2, 4)), train=False, rng=None)
      >>> out.features.shape, out.logits.shape
      ((2, 8), (2, 3))
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"from_nnx takes a flax.nnx.Module instance, got {module!r:.80}")
    return nnx_network(module, functools.partial(_call, type(module).__name__))


def nnx_network(module: nnx.Module, call: Callable[[nnx.Module, Tree, bool], Outputs]) -> Network:
    """Wrap an NNX module, on a copy of which ``call(module, x, train)`` computes the outputs."""
    # Random state is split off: its counters and keys do not belong in what devices average.
    graph, params, rngs, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
    streams = _Streams(rngs)

    def export(params, state):
        trained = nnx.merge(graph, params, rngs, state, copy=True)
        trained.eval()  # what one does with a trained network first is use it
        return trained

    apply = functools.partial(_apply_nnx, graph, streams, call)
    return Network(lambda key, x: (params, state), apply, export, (params, state))


def _call(name: str, module: Any, x: Tree, train: bool) -> Outputs:
    del train  # it is told by train() and eval()
    return _outputs(module(x), name)


class _Streams:
    """The random streams of an NNX module, compared by value.

    A compiled program may hold them, because they are a few integers and no arrays on a device.
    """

    def __init__(self, rngs: nnx.State):
        leaves, self._structure = jax.tree.flatten(rngs)
        self._kinds = [jax.random.key_impl(x) if is_key(x) else None for x in leaves]
        self._values = [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in leaves]
        variables = jax.tree.leaves(rngs, is_leaf=lambda v: isinstance(v, nnx.Variable))
        self.names = sorted({v.tag for v in variables if isinstance(v, nnx.RngKey)})
        contents = ((str(x.dtype), x.shape, x.tobytes()) for x in self._values)
        self._compared = (self._structure, tuple(map(str, self._kinds)), tuple(contents))

    def state(self) -> nnx.State:
        """Return the module's own random state."""
        pairs = zip(self._values, self._kinds, strict=True)
        leaves = [
            jnp.asarray(x) if k is None else jax.random.wrap_key_data(jnp.asarray(x), impl=k)
            for x, k in pairs
        ]
        return jax.tree.unflatten(self._structure, leaves)

    def keys(self, rng: jax.Array) -> dict[str, Any]:
        """Return a key for each stream: one step's own."""
        usual = {"default": rng, "params": rng, "dropout": rng}
        others = (name for name in self.names if name not in usual)
        return usual | {n: jax.random.fold_in(rng, zlib.crc32(n.encode())) for n in others}

    def __hash__(self) -> int:
        return hash(self._compared)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Streams) and self._compared == other._compared


def is_key(x: Any) -> bool:
    """Return whether an array holds typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _apply_nnx(graph, streams: _Streams, call, params, state, x, *, train, rng=None):
    m = nnx.merge(graph, params, streams.state(), state, copy=True)
    if train:
        m.train()
        if rng is not None:
            # A layer that was made by vmap has as many keys as it has copies.
            nnx.reseed(m, policy="match_shape", **streams.keys(rng))
        if on_devices():
            for _, sub in nnx.iter_graph(m):
                if isinstance(sub, nnx.BatchNorm) and sub.axis_name is None:
                    sub.axis_name = DEVICES
    else:
        m.eval()
    with nn.intercept_methods(synchronise):  # of Linen modules inside
        out = call(m, x, train)
    return out, nnx.split(m, nnx.Param, nnx.RngState, ...)[3]


def from_linen(module: nn.Module, variables: dict | None = None) -> Network:
    """Wrap a Flax Linen module.

    Its ``__call__`` returns what `from_nnx` describes, and takes ``train`` or ``training`` (or
    ``deterministic``, the opposite) if its behaviour depends on the mode. Dropout draws from
    the step's key, and BatchNorm is synchronised over devices without being told to.

    Args:
      module: the module.
      variables: trained variables, as ``module.init`` returns them; without them ``init`` draws
        fresh ones.

    Returns:
      A `Network`.

    Raises:
      TypeError: when the module is not Linen, or at its first call, when it returns anything
        but the above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> class Tiny(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train: bool):
      ...         norm = nn.BatchNorm(use_running_average=not train)
      ...         features = nn.relu(norm(nn.Dense(8)(x)))
      ...         return features, nn.Dense(3)(features)
      >>> network = from_linen(Tiny())
      >>> params, state = network.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> out, state = network.apply(params, state, jnp.ones((2, 4)), train=True, rng=None)
      >>> out.features.shape, list(state)
      ((2, 8), ['batch_stats'])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"from_linen takes a flax.linen.Module instance, got {module!r:.80}")
    return linen_network(module, variables, functools.partial(_returned, type(module).__name__))


def linen_network(
    module: nn.Module,
    variables: dict | None,
    read: Callable[[Any, dict, Tree], Outputs],
    layers: tuple[str, ...] = (),
) -> Network:
    """Wrap a Linen module whose outputs ``read(returned, intermediates of layers, x)`` makes."""

    def init(key, x):
        if variables is None:
            keys: dict[str, Any] = dict(
                zip(("params", "dropout"), jax.random.split(key), strict=True)
            )
            fresh = module.init(keys, x, **mode_of(module, train=False))
        else:
            fresh = variables
        return fresh["params"], {k: v for k, v in fresh.items() if k != "params"}

    def export(params, state):
        return {"params": params, **state}

    own = None if variables is None else init(None, None)
    return Network(init, functools.partial(_apply_linen, module, read, layers), export, own)


def _returned(name: str, returned: Any, intermediates: dict, x: Tree) -> Outputs:
    del intermediates, x
    return _outputs(returned, name)


def mode_of(module: Any, *, train: bool) -> dict[str, Any]:
    """Return the arguments that tell a module its mode, as far as its call takes them."""
    accepted = inspect.signature(type(module).__call__).parameters
    modes = {"train": train, "training": train, "deterministic": not train}
    return {name: value for name, value in modes.items() if name in accepted}


def _apply_linen(module: nn.Module, read, layers, params, state, x, *, train, rng=None):
    variables, mode = {"params": params, **state}, mode_of(module, train=train)
    if layers:
        wanted = lambda sub, method: method == "__call__" and ".".join(sub.path) in layers  # noqa: E731
        mode["capture_intermediates"] = wanted
    own = ["intermediates"] if layers else []
    if not train:
        returned = module.apply(variables, x, **mode, mutable=own)
        out, seen = returned if own else (returned[0], {})
        return read(out, seen, x), state
    # A stream that has no key of its own draws from "params", so any named one advances.
    rngs = {} if rng is None else {"dropout": rng, "params": jax.random.fold_in(rng, 1)}
    with nn.intercept_methods(synchronise):
        out, seen = module.apply(variables, x, **mode, rngs=rngs, mutable=[*state, *own])
    new_state = {name: value for name, value in seen.items() if name in state}
    return read(out, seen, x), new_state


def as_network(model: Model) -> Network:
    """Return a `Network` as it is, and a Flax module wrapped; TypeError for anything else."""
    if isinstance(model, Network):
        return model
    if isinstance(model, nnx.Module):
        return from_nnx(model)
    if isinstance(model, nn.Module):
        return from_linen(model)
    raise TypeError(
        "a model is a flax.nnx.Module, a flax.linen.Module or a kd2m_jax.Network, got "
        f"{_what_it_is(model)}"
    )


def logits_of(model: Model) -> Network:
    """Return a network whose features do not count: a module that returns logits alone will do."""

    def read(returned: Any) -> Outputs:
        alone = hasattr(returned, "shape")
        return Outputs(returned, returned) if alone else _outputs(returned, type(model).__name__)

    if isinstance(model, nnx.Module):
        return nnx_network(model, lambda module, x, train: read(module(x)))
    if isinstance(model, nn.Module):
        return linen_network(model, None, lambda returned, seen, x: read(returned))
    return as_network(model)


def _what_it_is(model: Any) -> str:
    """Describe an object that is not a model, and what its owner probably wants."""
    name = type(model).__name__
    if isinstance(model, type):
        return f"the class {model.__name__}: make one, {model.__name__}(...)"
    if isinstance(model, str):
        return f"the name {model!r}: models.build makes a network of a name"
    if hasattr(model, "student") and hasattr(model, "history"):
        return f"{name}: give its .student"
    if isinstance(model, list | tuple):
        return f"a {name}: one network is wanted here"
    if hasattr(model, "shape") and hasattr(model, "dtype"):
        return (
            f"an array: Outputs(...) of a teacher's for the same rows, Bank(...) of others ({name})"
        )
    if any(base.__module__.startswith("torch.") for base in type(model).__mro__):
        return f"{name} of torch: models.load_torch_weights reads the weights of a ResNet"
    return name


def _outputs(out: Any, name: str) -> Outputs:
    if isinstance(out, tuple) and 2 <= len(out) <= 3:
        return Outputs(*out)
    shape = getattr(out, "shape", None)
    kind = type(out).__name__ if shape is None else f"one array of shape {list(shape)}"
    raise TypeError(
        f"{name} must return kd2m_jax.Outputs, (features, logits) or (features, "
        f"logits, maps), got {kind}: have it return its penultimate features too, or let "
        "kd2m_jax.capture(network, features=...) read a layer of it"
    )
