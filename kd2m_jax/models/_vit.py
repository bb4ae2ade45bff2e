"""A vision transformer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax._compat import layer_list
from kd2m_jax._outputs import Outputs
from kd2m_jax.models._layers import check_images, head


class _Block(nnx.Module):
    """Attention between tokens, then an MLP on each, both normalised before and added."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, width // self.heads)
        y = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)))
        x = x + self.proj(y.reshape(n, t, width))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """Map images through patches, transformer blocks and a linear head on the class token.

    Features ``[n, width]`` are the class token after the last normalisation; there are no maps.

    Args:
      num_classes: number k of logits.
      image_shape: ``(height, width, channels)``; multiples of the patch.
      patch: pixels of a patch's side.
      width: of a token; a multiple of heads.
      depth: number of blocks.
      heads: of the attention.
      dtype: what the blocks compute in.
      rngs: keys for the initial parameters.

    Raises:
      ValueError: sizes that do not divide; at the call, images of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> def outputs():
      ...     net = ViT(10, image_shape=(32, 32, 3), patch=4, rngs=nnx.Rngs(0))
      ...     return net(jnp.ones((2, 32, 32, 3)))
      >>> nnx.eval_shape(outputs).features.shape
      (2, 192)

    References:
      Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; the tiny size is that of
      Touvron et al., DeiT, ICML 2021.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_shape: tuple[int, int, int],
        patch: int = 16,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        tall, wide, channels = image_shape
        if tall % patch or wide % patch or width % heads:
            raise ValueError(
                f"images {tall}x{wide} must be multiples of the patch {patch}, and width {width} "
                f"of the {heads} heads"
            )
        self.image_shape, self.dtype = tuple(image_shape), dtype
        tokens = (tall // patch) * (wide // patch)
        normal = nnx.initializers.normal(0.02)
        size = (patch, patch)
        self.patches = nnx.Conv(
            channels, width, size, size, padding="VALID", dtype=dtype, rngs=rngs
        )
        self.token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        self.places = nnx.Param(normal(rngs.params(), (1, tokens + 1, width)))
        self.blocks = layer_list(_Block(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.fc = head(width, num_classes, dtype, rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Map ``[n, height, width, channels]`` images to ``Outputs``."""
        check_images("ViT", x, self.image_shape[-1])
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"expected images [n, {self.image_shape}], got {x.shape}")
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = (jnp.concatenate([token, x], axis=1) + self.places[...]).astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        features = self.norm(x)[:, 0].astype(self.fc.dtype)
        return Outputs(features, self.fc(features))
