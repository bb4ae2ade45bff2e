"""Residual networks: two kinds of blocks, the network around them, and the published sizes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax._compat import layer_list
from kd2m_jax._outputs import Outputs
from kd2m_jax.models._layers import check_images, conv, head, norm, shortcut


class BasicBlock(nnx.Module):
    """Add a shortcut to two 3x3 convolutions, ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``.

    Args:
      in_width: channels of the input ``[n, h, w, in_width]``.
      width: channels of the output.
      stride: of the first convolution; 2 halves height and width.
      dtype: what the convolutions compute in.
      rngs: keys for the initial parameters.

    Raises:
      ValueError: at the call, for an input with other than ``in_width`` channels.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> make = lambda: BasicBlock(16, 32, 2, dtype=float, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(lambda: make()(jnp.ones((2, 8, 8, 16)))).shape
      (2, 4, 4, 32)

    References:
      He et al., "Deep residual learning for image recognition", CVPR 2016, figure 5 left.
    """

    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.conv1 = conv(in_width, width, 3, stride, dtype, rngs)
        self.bn1 = norm(width, dtype, rngs)
        self.conv2 = conv(width, width, 3, 1, dtype, rngs)
        self.bn2 = norm(width, dtype, rngs)
        self.downsample = shortcut(in_width, width, stride, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[n, h, w, in_width]`` to ``[n, h / stride, w / stride, width]``."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(x + y).astype(self.dtype)


class Bottleneck(nnx.Module):
    """Add a shortcut to a 1x1, a 3x3 and a 1x1 convolution, the last four times as wide.

    Arguments and errors are as of `BasicBlock`; the output is ``[n, h, w, 4 * width]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> make = lambda: Bottleneck(16, 32, 2, dtype=float, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(lambda: make()(jnp.ones((2, 8, 8, 16)))).shape
      (2, 4, 4, 128)

    References:
      He et al., CVPR 2016, figure 5 right, with the stride on the 3x3 convolution ("v1.5"), as in
      torchvision.
    """

    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.conv1 = conv(in_width, width, 1, 1, dtype, rngs)
        self.bn1 = norm(width, dtype, rngs)
        self.conv2 = conv(width, width, 3, stride, dtype, rngs)
        self.bn2 = norm(width, dtype, rngs)
        self.conv3 = conv(width, 4 * width, 1, 1, dtype, rngs)
        self.bn3 = norm(4 * width, dtype, rngs)
        self.downsample = shortcut(in_width, 4 * width, stride, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[n, h, w, in_width]`` to ``[n, h / stride, w / stride, 4 * width]``."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(x + y).astype(self.dtype)


class ResNet(nnx.Module):
    """Map images through a stem, stages of residual blocks, average pooling and a linear head.

    From its second stage on, a stage halves height and width. Where a block changes the shape,
    its shortcut is a 1x1 convolution with batch normalisation, as in torchvision and in
    RepDistiller. Layers are named so that :func:`load_torch_weights` finds them.

    Args:
      block: ``BasicBlock`` or ``Bottleneck``.
      depths: number of blocks of each stage.
      widths: width of the stem, then of each stage (before a ``Bottleneck``'s expansion).
      num_classes: number k of logits.
      in_channels: channels of the images, 3 for colour, 1 for grey.
      stem: "cifar", a 3x3 convolution, for images of 8 to 64 pixels a side; "imagenet", a 7x7
        convolution and a 3x3 max-pooling with stride 2 each, which torchvision's weights need.
      dtype: what the convolutions compute in.
      rngs: keys for the initial parameters.

    Raises:
      ValueError: if the stem is unknown or ``widths`` has not one entry more than ``depths``; at
        the call, if the images are not ``[n, h, w, in_channels]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> def outputs():
      ...     return resnet8(10, in_channels=1, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 1)))
      >>> out = nnx.eval_shape(outputs)  # the shapes alone, at no cost
      >>> out.features.shape, out.logits.shape
      ((2, 64), (2, 10))
      >>> [m.shape for m in out.maps]
      [(2, 8, 8, 16), (2, 4, 4, 32), (2, 2, 2, 64)]

    References:
      He et al., "Deep residual learning for image recognition", CVPR 2016; the small networks are
      those of its section 4.2 in the widths of Tian et al., "Contrastive representation
      distillation", ICLR 2020.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        in_channels: int = 3,
        stem: str = "cifar",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}')
        if len(widths) != len(depths) + 1:
            raise ValueError(
                f"widths must be the stem's and each stage's, so {len(depths) + 1} numbers "
                f"for depths {depths}, got {widths}"
            )
        self.in_channels = in_channels
        self.stem = stem
        self.dtype = dtype
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = conv(in_channels, widths[0], kernel, stride, dtype, rngs)
        self.bn1 = norm(widths[0], dtype, rngs)
        self.stages = layer_list()
        in_width = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths[1:], strict=True)):
            blocks = layer_list()
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(in_width, width, stride, dtype=dtype, rngs=rngs))
                in_width = block.expansion * width
            self.stages.append(blocks)
        self.fc = head(in_width, num_classes, dtype, rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Map ``[n, h, w, in_channels]`` images to ``Outputs``, with one map per stage."""
        check_images("ResNet", x, self.in_channels)
        x = nnx.relu(self.bn1(self.conv1(x))).astype(self.dtype)
        if self.stem == "imagenet":
            padding = ((1, 1), (1, 1))
            x = nnx.max_pool(x, (3, 3), (2, 2), padding)  # pyright: ignore[reportArgumentType]
        maps = []
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            maps.append(x)
        features = jnp.mean(x, axis=(1, 2), dtype=self.fc.dtype)
        return Outputs(features, self.fc(features), tuple(maps))


def resnet18(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-18, ``ResNet(BasicBlock, (2, 2, 2, 2), (64, 64, 128, 256, 512), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 512]``.
    """
    depths, widths = (2, 2, 2, 2), (64, 64, 128, 256, 512)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(BasicBlock, depths, widths, num_classes, **options)


def resnet34(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-34, ``ResNet(BasicBlock, (3, 4, 6, 3), (64, 64, 128, 256, 512), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 512]``.
    """
    depths, widths = (3, 4, 6, 3), (64, 64, 128, 256, 512)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(BasicBlock, depths, widths, num_classes, **options)


def resnet50(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-50, ``ResNet(Bottleneck, (3, 4, 6, 3), (64, 64, 128, 256, 512), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 2048]``.
    """
    depths, widths = (3, 4, 6, 3), (64, 64, 128, 256, 512)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(Bottleneck, depths, widths, num_classes, **options)


def resnet101(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-101, ``ResNet(Bottleneck, (3, 4, 23, 3), (64, 64, 128, 256, 512), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 2048]``.
    """
    depths, widths = (3, 4, 23, 3), (64, 64, 128, 256, 512)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(Bottleneck, depths, widths, num_classes, **options)


def resnet8(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-8, ``ResNet(BasicBlock, (1, 1, 1), (16, 16, 32, 64), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 64]``.
    """
    depths, widths = (1, 1, 1), (16, 16, 32, 64)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(BasicBlock, depths, widths, num_classes, **options)


def resnet20(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-20, ``ResNet(BasicBlock, (3, 3, 3), (16, 16, 32, 64), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 64]``.
    """
    depths, widths = (3, 3, 3), (16, 16, 32, 64)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(BasicBlock, depths, widths, num_classes, **options)


def resnet56(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-56, ``ResNet(BasicBlock, (9, 9, 9), (16, 16, 32, 64), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 64]``.
    """
    depths, widths = (9, 9, 9), (16, 16, 32, 64)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(BasicBlock, depths, widths, num_classes, **options)


def resnet8x4(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-8x4, ``ResNet(BasicBlock, (1, 1, 1), (32, 64, 128, 256), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 256]``.
    """
    depths, widths = (1, 1, 1), (32, 64, 128, 256)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(BasicBlock, depths, widths, num_classes, **options)


def resnet32x4(
    num_classes: int,
    *,
    in_channels: int = 3,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet-32x4, ``ResNet(BasicBlock, (5, 5, 5), (32, 64, 128, 256), ...)``.

    `ResNet` says what ``num_classes``, ``in_channels``, ``stem``, ``dtype`` and ``rngs`` are, and
    what raises.

    Returns:
      A network with features ``[n, 256]``.
    """
    depths, widths = (5, 5, 5), (32, 64, 128, 256)
    options = {"in_channels": in_channels, "stem": stem, "dtype": dtype, "rngs": rngs}
    return ResNet(BasicBlock, depths, widths, num_classes, **options)
