"""Teachers that are no network of the moment: several, the student's own past, what is left."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Model, Network, Tree, as_network
from kd2m_jax.losses import ClassStatistics
from kd2m_jax.losses._checks import class_labels, matrix

__all__ = ["Bank", "ema_teacher", "ensemble"]


def ensemble(models: Sequence[Model], *, weights: Sequence[float] | None = None) -> Network:
    """Make one teacher of several: mean probabilities, and all features side by side.

    Logits are ``log(sum_i w_i softmax(h_i))``, features ``[n, d_1 + d_2 + ...]``. There are no
    feature maps. Metrics between features of unequal sizes need a student of that size, or
    `projected`.

    Args:
      models: trained NNX modules, or networks that bring their variables (`from_linen` with its
        ``variables`` makes such a `Network`). All have the same classes.
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
    if (
        not networks
        or shares.shape != (len(networks),)
        or not np.all(np.isfinite(shares) & (shares > 0))
    ):
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
            sizes = {jnp.shape(out.logits)[1] for out in outs}
            if len(sizes) > 1:
                raise ValueError(f"the networks of an ensemble have {sorted(sizes)} classes")
            log_p = [
                share + jax.nn.log_softmax(jnp.asarray(out.logits, jnp.float32))
                for share, out in zip(self.log_shares, outs, strict=True)
            ]
            logits = jax.nn.logsumexp(jnp.stack(log_p), axis=0)
        features = jnp.concatenate([out.features for out in outs], axis=1)
        return Outputs(features, logits), tuple(states)


class Bank:
    """A teacher that is gone: features that it computed for other images than the student sees.

    Only distances between distributions can use one. Each step draws rows of it afresh, with
    replacement, from the seed and the step alone: the same on every device, and after a resumption.

    Args:
      features: ``[m, d]`` float.
      labels: ``[m]`` integers, their classes, for a conditional metric; -1 for none.
      logits: ``[m, k]`` float, for a metric that takes predictions (``jw2``).
      rows: how many a step draws; None for as many as the batch has, which lets `losses.w2` be
        exact.

    Raises:
      ValueError: rows below 1, or arrays that do not have a row for each feature.
      TypeError: features that are not floating point, labels that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> bank = Bank(jnp.ones((100, 8)), labels=jnp.arange(100) % 3, rows=None)
      >>> bank.outputs.features.shape, bank.rows
      ((100, 8), None)
    """

    def __init__(
        self,
        features: ArrayLike,
        *,
        labels: ArrayLike | None = None,
        logits: ArrayLike | None = None,
        rows: int | None = 256,
    ):
        if isinstance(features, Outputs):
            raise TypeError("a bank takes arrays: Bank(outputs.features, logits=outputs.logits)")
        whole = isinstance(rows, int | np.integer) and not isinstance(rows, bool)
        if rows is not None and (not whole or rows < 1):
            raise ValueError(f"rows must be at least 1, or None, got {rows!r}")
        z = matrix("the bank's features", features)
        self.rows = None if rows is None else int(rows)
        self.outputs = Outputs(z, None if logits is None else matrix("the bank's logits", logits))
        self.labels = None if labels is None else class_labels(labels, len(z))
        if logits is not None and len(self.outputs.logits) != len(z):  # pyright: ignore
            raise ValueError(f"the bank has {len(z)} features and {len(np.asarray(logits))} logits")


@dataclasses.dataclass(frozen=True)
class EmaTeacher:
    """The student's own moving average as its teacher: see `ema_teacher`.

    Attributes:
      decay: how much of the average a step keeps.
    """

    decay: float

    def kept(self, step: jax.Array) -> float:
        """Return how much of the average stays at a step."""
        return self.decay


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
    if not isinstance(decay, int | float | np.number) or not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay!r}")
    return EmaTeacher(float(decay))


class Memory(NamedTuple):
    """What a step needs of a `Bank` or of `ClassStatistics`, on the devices: a pytree.

    Attributes:
      outputs: the bank's, or None.
      labels: the bank's, or None.
      statistics: or None.
    """

    outputs: Outputs | None
    labels: jax.Array | None
    statistics: ClassStatistics | None

    @classmethod
    def of(cls, teacher: Bank | ClassStatistics) -> "Memory":
        """Take what a caller gave."""
        if isinstance(teacher, Bank):
            return cls(teacher.outputs, teacher.labels, None)
        return cls(None, None, teacher)

    def draw(self, key: jax.Array, n: int) -> tuple[Outputs, jax.Array | None]:
        """Return n rows and their classes."""
        if self.statistics is not None:
            features, labels = self.statistics.draw(key, n)
            return Outputs(features), labels
        rows = jax.random.randint(key, (n,), 0, len(self.outputs.features))  # pyright: ignore
        return jax.tree.map(lambda a: a[rows], (self.outputs, self.labels))
