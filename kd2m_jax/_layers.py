"""The layers that our networks are made of, with torch's padding, epsilon and initialisation."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax._compat import List

# Made once: flax < 0.12 compares the initialisers too when it compares two networks' structure.
_HE_NORMAL = nnx.initializers.he_normal()
_HE_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as torch's Linear


def conv(
    in_width: int, width: int, kernel: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv:
    # Explicit padding: under stride 2, "SAME" pads an even image on one side only, torch on both.
    return nnx.Conv(
        in_width,
        width,
        (kernel, kernel),
        strides=stride,
        padding=((kernel // 2, kernel // 2), (kernel // 2, kernel // 2)),
        use_bias=False,
        kernel_init=_HE_FAN_OUT,
        dtype=dtype,
        rngs=rngs,
    )


def norm(width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # Never in bfloat16: in eval mode nnx.BatchNorm would round its running statistics to it.
    dtype = jnp.promote_types(dtype, jnp.float32)
    return nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


def shortcut(in_width: int, width: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs) -> Sequence:
    if stride == 1 and in_width == width:
        return List()
    return List([conv(in_width, width, 1, stride, dtype, rngs), norm(width, dtype, rngs)])


def dense(features: int, width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(features, width, kernel_init=_HE_NORMAL, dtype=dtype, rngs=rngs)


def head(features: int, num_classes: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    dtype = jnp.promote_types(dtype, jnp.float32)
    return nnx.Linear(features, num_classes, kernel_init=_UNIFORM, dtype=dtype, rngs=rngs)
