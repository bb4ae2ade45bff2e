"""What a network shows to a loss."""

from typing import NamedTuple

import jax


class Outputs(NamedTuple):
    """What a network computes for one batch of n examples, as the losses see it.

    A pytree, so it passes through ``jit``, ``grad``, ``vmap`` and collectives as it is. A
    network may also return the plain tuples ``(features, logits)`` or ``(features, logits,
    maps)``: they are read in this order.

    Attributes:
      features: ``[n, d]``, the representation that is matched, usually the pooled output of
        the last stage, before the classifier.
      logits: ``[n, k]``, unnormalised log-probabilities of the classes, or None.
      maps: the stages' feature maps, first stage first, each ``[n, height, width, channels]``.

    Example:
      >>> import jax.numpy as jnp
      >>> out = Outputs(features=jnp.ones((4, 8)), logits=jnp.zeros((4, 3)))
      >>> out.features.shape, out.maps
      ((4, 8), ())
    """

    features: jax.Array
    logits: jax.Array | None = None
    maps: tuple[jax.Array, ...] = ()
