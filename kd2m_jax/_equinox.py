"""Equinox models as networks. Equinox is optional: it is imported when it is used."""

import functools
import inspect
from typing import Any

import jax

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Network, Tree


def from_equinox(model: Any, state: Any = None) -> Network:
    """Wrap an Equinox model, which is written for one example: it is mapped over the batch.

    Its call takes ``x``, then the state where there is one, and ``key`` if it draws. It returns
    ``(features, logits)`` or `Outputs`, with the new state after it where there is one. The
    batch's axis is called "batch", as Equinox's BatchNorm wants it. Its statistics are those of
    a device's part of the batch, and their averages are the mean over the devices.

    Args:
      model: the model; ``eqx.nn.inference_mode`` sets its mode.
      state: what ``eqx.nn.make_with_state`` gave beside it, or None.

    Returns:
      A `Network` that brings its variables. What comes back as the trained student is the model in
      inference mode, or ``(model, state)``.

    Raises:
      ImportError: Equinox is not installed.
      TypeError: what is no Equinox module, or, at the first call, returns something else: features
        ``[d]`` and logits ``[k]`` are wanted.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp
      >>> class Net(eqx.Module):
      ...     hidden: eqx.nn.Linear
      ...     head: eqx.nn.Linear
      ...     def __call__(self, x):
      ...         features = jax.nn.relu(self.hidden(x))
      ...         return features, self.head(features)
      >>> keys = jax.random.split(jax.random.key(0))
      >>> hidden = eqx.nn.Linear(4, 8, key=keys[0])
      >>> net = Net(hidden, eqx.nn.Linear(8, 3, key=keys[1]))
      >>> network = from_equinox(net)
      >>> out, _ = network.apply(*network.variables, jnp.ones((2, 4)), train=False)
      >>> out.features.shape, out.logits.shape
      ((2, 8), (2, 3))
    """
    try:
        import equinox as eqx
    except ImportError as error:
        raise ImportError("from_equinox needs Equinox: pip install equinox") from error
    if not isinstance(model, eqx.Module):
        raise TypeError(f"from_equinox takes an Equinox module, got {type(model).__name__}")
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def export(params: Tree, state: Tree) -> Any:
        trained = eqx.nn.inference_mode(eqx.combine(params, static))
        return trained if state is None else (trained, state)

    apply = functools.partial(_apply, static, type(model).__name__)
    return Network(lambda key, x: (params, state), apply, export, (params, state))


def _apply(static: Any, name: str, params, state, x, *, train: bool, rng=None):
    import equinox as eqx

    model = eqx.nn.inference_mode(eqx.combine(params, static), value=not train)
    draws = "key" in inspect.signature(type(model).__call__).parameters

    def one(x, key):
        # A copy, because Equinox lets a state be used once.
        given = (x,) if state is None else (x, jax.tree.map(lambda a: a, state))
        returned = model(*given, **({"key": key} if draws else {}))
        out, new = (returned, None) if state is None else returned
        if not isinstance(out, tuple | list) or not 2 <= len(out) <= 3:
            raise TypeError(
                f"{name} must return (features, logits) for one example, got {out!r:.80}"
            )
        return Outputs(*out), new

    n = len(jax.tree.leaves(x)[0])
    keys = None if rng is None else jax.random.split(rng, n)
    axes = (Outputs(0, 0, 0), None)  # pyright: ignore[reportArgumentType]
    mapped = jax.vmap(
        one, in_axes=(0, None if keys is None else 0), out_axes=axes, axis_name="batch"
    )
    return mapped(x, keys)
