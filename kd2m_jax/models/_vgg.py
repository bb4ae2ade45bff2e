"""VGG networks for small images, as the CIFAR-100 tables use them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax._compat import layer_list
from kd2m_jax._outputs import Outputs
from kd2m_jax.models._layers import check_images, conv, head, norm


class VGG(nnx.Module):
    """Map small images through five blocks of 3x3 convolutions, pooling and a linear head.

    The first three blocks end with 2x2 max-pooling, and the fourth where images have 64 pixels a
    side; the fifth with the mean over space. Each convolution is normalised.

    Args:
      depths: convolutions of each of the five blocks, of 64, 128, 256, 512 and 512 channels:
        (1, 1, 1, 1, 1) is VGG-8, (2, 2, 2, 2, 2) VGG-13.
      num_classes: number k of logits.
      in_channels: channels of the images.
      dtype: what the convolutions compute in.
      rngs: keys for the initial parameters.

    Raises:
      ValueError: other than five depths; at the call, images that are not
        ``[n, h, w, in_channels]`` or have fewer than 8 pixels a side.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> def outputs():
      ...     return VGG((1, 1, 1, 1, 1), 100, rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3)))
      >>> out = nnx.eval_shape(outputs)
      >>> out.features.shape, [m.shape[1:] for m in out.maps][-2:]
      ((2, 512), [(4, 4, 512), (4, 4, 512)])

    References:
      Simonyan & Zisserman, ICLR 2015; for CIFAR-100 as Tian et al., "Contrastive representation
      distillation", ICLR 2020, have them.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int,
        *,
        in_channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(depths) != 5 or min(depths) < 1:
            raise ValueError(f"depths must be five numbers >= 1, got {depths}")
        self.in_channels, self.dtype = in_channels, dtype
        self.blocks = layer_list()
        in_width = in_channels
        for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
            layers = layer_list()
            for _ in range(depth):
                layers.append(conv(in_width, width, 3, 1, dtype, rngs, bias=True))
                layers.append(norm(width, dtype, rngs))
                in_width = width
            self.blocks.append(layers)
        self.fc = head(in_width, num_classes, dtype, rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Map ``[n, h, w, in_channels]`` images to ``Outputs``, with one map per block."""
        check_images("VGG", x, self.in_channels)
        if min(x.shape[1:3]) < 8:
            raise ValueError(f"images must have 8 pixels a side at least, got {x.shape}")
        pools, maps = 4 if x.shape[1] >= 64 else 3, []
        for number, layers in enumerate(self.blocks):
            for i in range(0, len(layers), 2):
                x = nnx.relu(layers[i + 1](layers[i](x))).astype(self.dtype)
            maps.append(x)
            if number < pools:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        features = jnp.mean(x, axis=(1, 2), dtype=self.fc.dtype)
        return Outputs(features, self.fc(features), tuple(maps))
