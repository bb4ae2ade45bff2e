"""The layers of our networks, with torch's padding and epsilon and with quick initialisers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

from kd2m_jax._compat import layer_list


def check_array(network: str, x: Any) -> None:
    """Raise TypeError for a pytree of arrays: these networks take one."""
    if not hasattr(x, "shape"):
        raise TypeError(f"{network} takes one array, got a {type(x).__name__}")


def check_images(network: str, x: Any, channels: int) -> None:
    """Raise TypeError for a pytree, ValueError for anything but images of so many channels."""
    check_array(network, x)
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"expected images [n, h, w, {channels}], got {x.shape}")


def conv(
    in_width: int,
    width: int,
    kernel: int,
    stride: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    *,
    groups: int = 1,
    bias: bool = False,
) -> nnx.Conv:
    """Make a square convolution that halves an image as torch's does."""
    # Explicit padding: under stride 2, "SAME" pads an even image on one side only, torch on both.
    return nnx.Conv(
        in_width,
        width,
        (kernel, kernel),
        strides=stride,
        padding=((kernel // 2, kernel // 2), (kernel // 2, kernel // 2)),
        use_bias=bias,
        feature_group_count=groups,
        kernel_init=_he_normal_over_outputs,
        dtype=dtype,
        rngs=rngs,
    )


def norm(width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Make a batch normalisation that computes in float32 at least."""
    # Never in bfloat16: in eval mode nnx.BatchNorm would round its running statistics to it.
    dtype = jnp.promote_types(dtype, jnp.float32)
    return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


def shortcut(in_width: int, width: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
    """Make a block's shortcut: no layer, or a 1x1 convolution and a normalisation."""
    if stride == 1 and in_width == width:
        return layer_list()
    return layer_list([conv(in_width, width, 1, stride, dtype, rngs), norm(width, dtype, rngs)])


def linear(fan_in: int, fan_out: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Make a linear layer for a ReLU to follow, He-normal over its inputs."""
    return nnx.Linear(fan_in, fan_out, kernel_init=_he_normal, dtype=dtype, rngs=rngs)


def head(features: int, num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Make a classifier that computes in float32 at least, with the kernel of torch's Linear."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    return nnx.Linear(features, num_classes, kernel_init=_uniform, dtype=dtype, rngs=rngs)


def _quickly(draw: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wrap a function ``(key, shape, dtype)`` of random numbers so that it compiles quickly."""
    # Outside of jit every shape of a weight is a program of its own, and random bits are what
    # LLVM optimises longest: 0.7 CPU s per shape, 0.25 at this level, with the same bits and as
    # fast to run (level 0: other last digits and 8 times slower). Building resnet8 takes 3.2
    # CPU s instead of 7.8, resnet34 4.3 instead of 9.5, and resnet8 under the flag of `_compiler`
    # 2.0 instead of 14.7 (jaxlib 0.10, no compilation cache; resnet8 with 0.7: 2.6 for 7.8, with
    # 0.12: 2.3 for 10.2).
    compiled = jax.jit(
        draw, static_argnums=(1, 2), compiler_options={"xla_backend_optimization_level": 1}
    )

    def drawn(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        # Within another traced function JAX refuses compiler options.
        if isinstance(key, Tracer) or jax.default_backend() != "cpu":
            return draw(key, shape, dtype)
        return compiled(key, shape, dtype)

    return drawn


# Made once: flax < 0.12 has a layer's initialiser in its graph definition, by which functions
# are compiled and students are stacked.
_normal = _quickly(jax.random.normal)
_he_normal = _quickly(nnx.initializers.he_normal())
_uniform = _quickly(nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))


def _he_normal_over_outputs(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draw what ``variance_scaling(2.0, "fan_out", "normal")`` of jax 0.10 draws, bit by bit."""
    # The product is a program of its own, as there: XLA would merge its factor with one within
    # `normal`, which changes the last digit of 40% of the weights (as jax 0.12's own does).
    fan_out = math.prod(shape) / shape[-2]
    return _normal(key, shape, dtype) * jnp.sqrt(jnp.array(2.0 / fan_out, dtype))
