"""MobileNetV2: inverted residual blocks of depthwise convolutions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax._compat import layer_list
from kd2m_jax._outputs import Outputs
from kd2m_jax.models._layers import check_images, conv, head, norm

# Of each stage: expansion, channels, blocks, stride.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST = 1280


class _Block(nnx.Module):
    """Widen by a 1x1 convolution, convolve each channel, narrow; add x where shapes allow it."""

    def __init__(self, in_width, width, stride, expansion, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = expansion * in_width
        self.dtype, self.adds = dtype, stride == 1 and in_width == width
        self.widen = layer_list()
        if expansion > 1:
            self.widen.append(conv(in_width, inner, 1, 1, dtype, rngs))
            self.widen.append(norm(inner, dtype, rngs))
        self.depthwise = conv(inner, inner, 3, stride, dtype, rngs, groups=inner)
        self.bn1 = norm(inner, dtype, rngs)
        self.narrow = conv(inner, width, 1, 1, dtype, rngs)
        self.bn2 = norm(width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if len(self.widen):
            y = nnx.relu6(self.widen[1](self.widen[0](y))).astype(self.dtype)
        y = nnx.relu6(self.bn1(self.depthwise(y))).astype(self.dtype)
        y = self.bn2(self.narrow(y)).astype(self.dtype)
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """Map images through 17 inverted residual blocks, average pooling and a linear head.

    The dropout before the head is left out.

    Args:
      num_classes: number k of logits.
      in_channels: channels of the images.
      stem: "imagenet" has the published strides; "cifar" does not halve images in the first
        convolution and in the second stage.
      dtype: what the convolutions compute in.
      rngs: keys for the initial parameters.

    Raises:
      ValueError: an unknown stem; at the call, images that are not ``[n, h, w, in_channels]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> def outputs():
      ...     return MobileNetV2(10, rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3)))
      >>> out = nnx.eval_shape(outputs)
      >>> out.features.shape, out.maps[-1].shape
      ((2, 1280), (2, 4, 4, 320))

    References:
      Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        stem: str = "cifar",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}')
        self.in_channels, self.dtype = in_channels, dtype
        small = stem == "cifar"
        self.conv1 = conv(in_channels, 32, 3, 1 if small else 2, dtype, rngs)
        self.bn1 = norm(32, dtype, rngs)
        self.stages = layer_list()
        in_width = 32
        for stage, (expansion, width, depth, first) in enumerate(_STAGES):
            blocks = layer_list()
            for i in range(depth):
                stride = first if i == 0 and not (small and stage == 1) else 1
                blocks.append(_Block(in_width, width, stride, expansion, dtype=dtype, rngs=rngs))
                in_width = width
            self.stages.append(blocks)
        self.conv2 = conv(in_width, _LAST, 1, 1, dtype, rngs)
        self.bn2 = norm(_LAST, dtype, rngs)
        self.fc = head(_LAST, num_classes, dtype, rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Map ``[n, h, w, in_channels]`` images to ``Outputs``, with one map per stage."""
        check_images("MobileNetV2", x, self.in_channels)
        x, maps = nnx.relu6(self.bn1(self.conv1(x))).astype(self.dtype), []
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        x = nnx.relu6(self.bn2(self.conv2(x))).astype(self.dtype)
        features = jnp.mean(x, axis=(1, 2), dtype=self.fc.dtype)
        return Outputs(features, self.fc(features), tuple(maps))
