"""A projector from a student's features into the teacher's, trained along with it."""

import functools
from typing import Any

import jax
from flax import nnx

from kd2m_jax._outputs import Outputs
from kd2m_jax.adapters import Apply, Model, Network, as_network, from_nnx


class _Projector(nnx.Module):
    """The student's features into another size, and its last map into other channels."""

    def __init__(self, like: Outputs, dim: int | None, channels: int | None, rngs: nnx.Rngs):
        layers: list[Any] = [None, None, None]
        if dim:
            layers[0] = nnx.Linear(like.features.shape[-1], dim, rngs=rngs)
        if channels:
            width = like.maps[-1].shape[-1]
            layers[1] = nnx.Conv(width, channels, (1, 1), use_bias=False, rngs=rngs)
            layers[2] = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.linear, self.conv, self.norm = layers

    def __call__(self, out: Outputs) -> Outputs:
        if self.linear is not None:
            out = out._replace(features=self.linear(out.features))
        if self.conv is not None and self.norm is not None:
            last = nnx.relu(self.norm(self.conv(out.maps[-1])))
            out = out._replace(maps=(*out.maps[:-1], last))
        return out


def projected(student: Model, dim: int | None = None, *, channels: int | None = None) -> Network:
    """Give a student a projector into the teacher's feature size, trained along with it.

    The projector sees to it that features (or maps) of unequal sizes can be matched. It is part
    of the parameters and the state, so of the optimizer, of gradient clipping and of
    checkpoints; the student's logits do not pass through it, and ``export`` leaves it out.

    Args:
      student: a Flax NNX or Linen module, or a `Network`.
      dim: the teacher's feature size d: a linear layer maps ``[n, d_s]`` features to ``[n, d]``.
        None leaves the features as they are.
      channels: the teacher's channels c: a 1x1 convolution, BatchNorm and ReLU map the last of
        the student's maps to ``[n, h, w, c]``, as WKD-F has it. None leaves the maps.

    Returns:
      A `Network` with parameters ``(student's, projector's)`` and state likewise.

    Raises:
      ValueError: neither size given, one below 1, or channels for a student without maps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kd2m_jax import models
      >>> net = models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(0))
      >>> network, x = projected(net, 32), jnp.ones((2, 4))
      >>> params, state = network.init(jax.random.key(0), x)
      >>> network.apply(params, state, x, train=False, rng=None)[0].features.shape
      (2, 32)
      >>> network.export(params, state)(x).features.shape
      (2, 8)

    References:
      FitNets (Romero et al., ICLR 2015); for maps, Lv et al., NeurIPS 2024 (WKD-F).
    """
    if (not dim and not channels) or min(dim or 1, channels or 1) < 1:
        raise ValueError(f"projected needs a size of at least 1, got {dim=} and {channels=}")
    inner = as_network(student)

    sizes = (dim, channels)

    def init(key, x):
        inner_key, own_key = jax.random.split(key)
        params, state = inner.init(inner_key, x)
        like = jax.eval_shape(lambda x: inner.apply(params, state, x, train=False, rng=None)[0], x)
        own_params, own_state = from_nnx(_projector(sizes, like, own_key)).init(None, None)
        return (params, own_params), (state, own_state)

    apply = functools.partial(_apply_projected, inner.apply, sizes)
    return Network(init, apply, lambda params, state: inner.export(params[0], state[0]))


def _projector(sizes: tuple[int | None, int | None], like: Outputs, key=None) -> _Projector:
    """Make the projector for such outputs; without a key its structure alone."""
    if sizes[1] and not like.maps:
        raise ValueError("channels projects the last of the student's maps, and it has none")
    if key is None:
        return nnx.eval_shape(lambda: _Projector(like, *sizes, nnx.Rngs(0)))
    return _Projector(like, *sizes, nnx.Rngs(key))


def _apply_projected(inner: Apply, sizes, params, state, x, *, train, rng=None):
    out, new_state = inner(params[0], state[0], x, train=train, rng=rng)
    own = from_nnx(_projector(sizes, out))
    out, own_state = own.apply(params[1], state[1], out, train=train, rng=None)
    return out, (new_state, own_state)
