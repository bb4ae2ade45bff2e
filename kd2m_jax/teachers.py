"""Teachers that are more than one trained network: several at once, and the student's own past."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Model, Network, Tree, as_network


def ensemble(models: Sequence[Model], *, weights: Sequence[float] | None = None) -> Network:
    """Make one teacher of several: mean probabilities, and all features side by side.

    Logits are ``log(sum_i w_i softmax(h_i))``, features ``[n, d_1 + d_2 + ...]``. There are no
    feature maps. Metrics between features of unequal sizes need a student of that size, or
    `projected`.

    Args:
      models: trained NNX modules, or `Network`s that bring their variables (`from_linen` with its
        ``variables`` makes one). All have the same classes.
      weights: > 0, one per model, brought to sum 1; equal ones by default.

    Returns:
      A `Network` that brings its variables: ``fit(..., teacher=ensemble([...]))``.

    Raises:
      ValueError: no models, weights that do not fit, or a model without variables.
      TypeError: a model that is none of the three kinds.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from kd2m_jax import models
      >>> nets = [models.MLP((w,), 3, in_features=4, rngs=nnx.Rngs(w)) for w in (8, 16)]
      >>> both, x = ensemble(nets, weights=[3, 1]), jnp.ones((2, 4))
      >>> out, _ = both.apply(*both.variables, x, train=False, rng=None)
      >>> out.features.shape, out.logits.shape
      ((2, 24), (2, 3))
    """
    networks = [as_network(model) for model in models]
    shares = np.ones(len(networks)) if weights is None else np.asarray(weights, np.float64)
    if not networks or shares.shape != (len(networks),) or not (shares > 0).all():
        raise ValueError(
            f"an ensemble takes models and a weight > 0 for each, got {len(networks)} models and "
            f"weights {weights}"
        )
    variables = [network.variables for network in networks]
    if any(one is None for one in variables):
        raise ValueError(
            "a model of an ensemble brings no trained variables: give an NNX module, or "
            "from_linen(module, variables)"
        )
    params, states = zip(*(one for one in variables if one is not None), strict=True)
    log_shares = tuple(np.log(shares / shares.sum()).tolist())
    apply = _Ensemble(tuple(network.apply for network in networks), log_shares)
    return Network(lambda key, x: (params, states), apply, variables=(params, states))


@dataclasses.dataclass(frozen=True)
class _Ensemble:
    """Apply of an ensemble: all networks on one batch."""

    applies: tuple[Any, ...]
    log_shares: tuple[float, ...]

    def __call__(self, params: Tree, state: Tree, x: Tree, *, train: bool, rng=None):
        outs, states = [], []
        for apply, p, s in zip(self.applies, params, state, strict=True):
            out, new = apply(p, s, x, train=train, rng=rng)
            outs.append(Outputs(*out))
            states.append(new)
        logits = None
        if all(out.logits is not None for out in outs):
            log_p = [
                share + jax.nn.log_softmax(jnp.asarray(out.logits, jnp.float32))
                for share, out in zip(self.log_shares, outs, strict=True)
            ]
            logits = jax.nn.logsumexp(jnp.stack(log_p), axis=0)
        features = jnp.concatenate([out.features for out in outs], axis=1)
        return Outputs(features, logits), tuple(states)


@dataclasses.dataclass(frozen=True)
class EmaTeacher:
    """The student's own moving average as its teacher: see `ema_teacher`.

    Attributes:
      decay: how much of the average a step keeps.
    """

    decay: float


def ema_teacher(decay: float = 0.999) -> EmaTeacher:
    """Make the student's own moving average its teacher (mean teacher).

    ``average <- decay * average + (1 - decay) * student`` after each step, of parameters and of
    the floating-point part of its state (batch statistics). It begins as the student does, runs in
    evaluation mode and is part of the checkpoints.

    Args:
      decay: in [0, 1); 0 is the student as the step finds it.

    Returns:
      A teacher for `fit`: ``fit(..., teacher=ema_teacher(0.99), metric="w2")``.

    Raises:
      ValueError: a decay that is not in [0, 1).

    Example:
      >>> ema_teacher(0.99)
      EmaTeacher(decay=0.99)

    References:
      Tarvainen & Valpola, Mean teachers are better role models, NeurIPS 2017.
    """
    if not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay!r}")
    return EmaTeacher(float(decay))
