"""A trained model on arrays of any size, batch by batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Apply, Model, Network, as_network, logits_of
from kd2m_jax.losses._metrics import as_outputs
from kd2m_jax.training._examples import as_arrays, check_rows
from kd2m_jax.training._programs import shared
from kd2m_jax.training._source import variables_of


def outputs(model: Model, x: Any, *, variables: Any = None, batch_size: int = 500) -> Outputs:
    """Compute what a model shows to a loss, once, for arrays of any size.

    A teacher that is not to run in training, or cannot, is ``fit(..., teacher=outputs(model, x))``.
    It sees x as it is: where `fit` has a ``preprocess``, give ``preprocess(x, None)``.

    Args:
      model: what `fit` takes as a student: an NNX module, a Linen module or a `Network`.
      x: inputs ``[n, ...]``, an array or a pytree of arrays with one row per example.
      variables: a Linen module's dict, or the pair ``(params, state)`` of a `Network` that does not
        bring its own.
      batch_size: rows at a time; the last batch is filled up, so that one program does.

    Returns:
      `Outputs` of NumPy arrays, in evaluation mode: features ``[n, d]``, logits ``[n, k]`` and
      maps as the model has them.

    Raises:
      ValueError: inputs without rows, no variables, a batch_size below 1.
      TypeError: a model that is none of the three kinds.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import models
      >>> net = models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0))
      >>> outputs(net, jnp.ones((10, 4)), batch_size=4).features.shape
      (10, 8)
    """
    return _outputs(as_network(model), model, x, variables, batch_size)


def _outputs(network: Network, model: Model, x: Any, variables: Any, batch_size: int) -> Outputs:
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size}")
    x = as_arrays("x", x)
    total = check_rows("x", x)
    size = min(batch_size, total)
    variables = variables_of(model, variables)
    program, parts = shared(_program, network.apply), []
    for start in range(0, total, size):
        batch = jax.tree.map(lambda a, s=start: _filled(a[s : s + size], size), x)
        count = min(size, total - start)
        seen = program(variables, batch)
        parts.append(jax.tree.map(lambda a, n=count: np.asarray(a)[:n], seen))
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def predict(model: Model, x: Any, *, variables: Any = None, batch_size: int = 500) -> np.ndarray:
    """Compute a model's logits for arrays of any size, in evaluation mode.

    Args:
      model: what `fit` takes as a student: an NNX module, a Linen module or a `Network`; or a
        module that returns its logits alone.
      x: inputs ``[n, ...]``, an array or a pytree of arrays with one row per example.
      variables: what `FitResult.student` or `restore` gave where that is no module.
      batch_size: rows at a time.

    Returns:
      Logits ``[n, k]``; the class is ``.argmax(1)``.

    Raises:
      ValueError: as `outputs`, and for a model without logits.
      TypeError: a model that is none of the three kinds.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import models
      >>> net = models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0))
      >>> predict(net, jnp.ones((10, 4))).shape
      (10, 3)
    """
    logits = _outputs(logits_of(model), model, x, variables, batch_size).logits
    if logits is None:
        raise ValueError("the model returns no logits")
    return np.asarray(logits)


def _filled(rows: Any, size: int) -> jax.Array:
    rows = jnp.asarray(rows)
    return jnp.pad(rows, [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def _program(apply: Apply):
    @jax.jit
    def program(variables, x):
        params, state = variables
        return as_outputs("model", apply(params, state, x, train=False, rng=None)[0])

    return program
