"""Wide residual networks, with normalisation before each convolution."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax._compat import layer_list
from kd2m_jax._outputs import Outputs
from kd2m_jax.models._layers import check_images, conv, head, norm


class _Block(nnx.Module):
    """``x + conv(relu(bn(conv(relu(bn(x))))))``; where shapes change x is a 1x1 convolution's."""

    def __init__(self, in_width: int, width: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.bn1 = norm(in_width, dtype, rngs)
        self.conv1 = conv(in_width, width, 3, stride, dtype, rngs)
        self.bn2 = norm(width, dtype, rngs)
        self.conv2 = conv(width, width, 3, 1, dtype, rngs)
        changes = in_width != width
        self.shortcut = layer_list([conv(in_width, width, 1, stride, dtype, rngs)] * changes)

    def __call__(self, x: jax.Array) -> jax.Array:
        before = nnx.relu(self.bn1(x)).astype(self.dtype)
        y = self.conv2(nnx.relu(self.bn2(self.conv1(before))).astype(self.dtype))
        for layer in self.shortcut:
            x = layer(before)
        return x + y


class WideResNet(nnx.Module):
    """Map small images through three stages of wide residual blocks and a linear head.

    Args:
      depth: 6 b + 4, for b blocks per stage.
      widen: how many times as wide as 16, 32 and 64 channels the stages are.
      num_classes: number k of logits.
      in_channels: channels of the images.
      dtype: what the convolutions compute in.
      rngs: keys for the initial parameters.

    Raises:
      ValueError: a depth that is none of 10, 16, 22, ...; at the call, images that are not
        ``[n, h, w, in_channels]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> def outputs():
      ...     return WideResNet(16, 2, 100, rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3)))
      >>> out = nnx.eval_shape(outputs)
      >>> out.features.shape, [m.shape[1:] for m in out.maps]
      ((2, 128), [(32, 32, 32), (16, 16, 64), (8, 8, 128)])

    References:
      Zagoruyko & Komodakis, "Wide residual networks", BMVC 2016.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int,
        *,
        in_channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depth < 10 or depth % 6 != 4 or widen < 1:
            raise ValueError(f"depth must be 10, 16, 22, ... and widen >= 1, got {depth}, {widen}")
        self.in_channels, self.dtype = in_channels, dtype
        self.conv1 = conv(in_channels, 16, 3, 1, dtype, rngs)
        self.stages = layer_list()
        in_width = 16
        for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            blocks = layer_list()
            for i in range((depth - 4) // 6):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_Block(in_width, width, stride, dtype=dtype, rngs=rngs))
                in_width = width
            self.stages.append(blocks)
        self.bn1 = norm(in_width, dtype, rngs)
        self.fc = head(in_width, num_classes, dtype, rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Map ``[n, h, w, in_channels]`` images to ``Outputs``, with one map per stage."""
        check_images("WideResNet", x, self.in_channels)
        x, maps = self.conv1(x), []
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        maps[-1] = x = nnx.relu(self.bn1(x)).astype(self.dtype)
        features = jnp.mean(x, axis=(1, 2), dtype=self.fc.dtype)
        return Outputs(features, self.fc(features), tuple(maps))
