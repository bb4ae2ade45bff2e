"""One functional protocol for Flax NNX and Linen networks, so that a step can mix them."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

from kd2m_jax.outputs import Outputs

# The name of the axis that a step runs over on several devices. A network's batch statistics
# are taken over it wherever it is bound.
DEVICES = "devices"


class Network(NamedTuple):
    """A network as two pure functions.

    Attributes:
      init: ``(key, x) -> (params, state)``: what the optimizer updates, and what the network
        itself does (batch statistics). ``x`` is a batch of inputs, of which only the shape and
        dtype count.
      apply: ``(params, state, x, *, train, rng) -> (Outputs, new_state)``. ``rng`` feeds
        dropout and may be None where ``train`` is False.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Outputs, Any]]


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
      ...         self.hidden, self.head = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
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
    # Random state is split off: its counters and keys do not belong in what devices average.
    graph, params, rngs, state = nnx.split(module, nnx.Param, nnx.RngState, ...)

    def init(key, x):
        del key, x
        return params, state

    def apply(params, state, x, *, train, rng=None):
        m = nnx.merge(graph, params, rngs, state, copy=True)
        if train:
            m.train()
            if rng is not None:
                nnx.reseed(m, default=rng, params=rng, dropout=rng)
            if _on_devices():
                for _, sub in nnx.iter_modules(m):
                    if isinstance(sub, nnx.BatchNorm) and sub.axis_name is None:
                        sub.axis_name = DEVICES
        else:
            m.eval()
        out = _outputs(m(x), module)
        return out, nnx.split(m, nnx.Param, nnx.RngState, ...)[3]

    return Network(init, apply)


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
      ...         features = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
      ...         return features, nn.Dense(3)(features)
      >>> network = from_linen(Tiny())
      >>> params, state = network.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> out, state = network.apply(params, state, jnp.ones((2, 4)), train=True, rng=None)
      >>> out.features.shape, list(state)
      ((2, 8), ['batch_stats'])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"from_linen takes a flax.linen.Module instance, got {module!r:.80}")
    accepted = inspect.signature(type(module).__call__).parameters

    def mode(train: bool) -> dict[str, Any]:
        modes = {"train": train, "training": train, "deterministic": not train}
        return {name: value for name, value in modes.items() if name in accepted}

    def init(key, x):
        if variables is None:
            keys: dict[str, Any] = dict(
                zip(("params", "dropout"), jax.random.split(key), strict=True)
            )
            fresh = module.init(keys, x, **mode(False))
        else:
            fresh = variables
        return fresh["params"], {k: v for k, v in fresh.items() if k != "params"}

    def apply(params, state, x, *, train, rng=None):
        all_variables = {"params": params, **state}
        if not train:
            return _outputs(module.apply(all_variables, x, **mode(False)), module), state
        rngs = {} if rng is None else {"dropout": rng}
        with nn.intercept_methods(_synchronise):
            out, new_state = module.apply(
                all_variables, x, **mode(True), rngs=rngs, mutable=list(state)
            )
        return _outputs(out, module), dict(new_state)

    return Network(init, apply)


def _synchronise(call, args, kwargs, context):
    """Linen interceptor: BatchNorm takes its statistics over all devices."""
    m = context.module
    if isinstance(m, nn.BatchNorm) and m.axis_name is None and _on_devices():
        object.__setattr__(m, "axis_name", DEVICES)  # a bound module is a copy for this call
    return call(*args, **kwargs)


def _on_devices() -> bool:
    """Whether this is traced inside a step over several devices."""
    try:
        jax.lax.axis_size(DEVICES)
    except NameError:
        return False
    return True


def _outputs(out: Any, module: Any) -> Outputs:
    if isinstance(out, tuple) and 2 <= len(out) <= 3:
        return Outputs(*out)
    raise TypeError(
        f"{type(module).__name__} must return kd2m_jax.Outputs, (features, logits) or (features, "
        f"logits, maps), got {type(out).__name__}: have it return its penultimate features too"
    )
