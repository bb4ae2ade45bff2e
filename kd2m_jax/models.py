"""Networks in Flax NNX: ResNets, MLPs, a registry by name, and weights from torch.

Every network maps a batch of channels-last images to :class:`kd2m_jax.outputs.Outputs`. In any
``dtype`` the parameters, the statistics of batch normalisation, the features and the logits stay
in float32 (features and logits follow a ``dtype`` of float64); only the activations between
layers, and so the maps, are in ``dtype``.

A new network is in training mode; ``eval()`` makes it use its running statistics, which torch
keeps too, with one difference: a training step here averages the *biased* variance of the
batch, torch the unbiased one (n against n - 1 for n = batch size x height x width).
"""

import difflib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax._compat import List
from kd2m_jax._layers import conv, dense, head, norm, shortcut
from kd2m_jax._torch_weights import load_torch_weights as load_torch_weights
from kd2m_jax.outputs import Outputs


def build(
    name: str,
    *,
    num_classes: int,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
) -> nnx.Module:
    """Builds a network by its name.

    Args:
      name: a name of ``MODELS``, or ``mlp-<width>-<width>...`` for a :class:`MLP` with these
        hidden layers, e.g. ``mlp-64-32``.
      num_classes: number k of logits.
      image_shape: ``(height, width, channels)`` of one image.
      rngs: keys for the initial parameters.
      stem: "cifar" or "imagenet", see :class:`ResNet`; it means nothing to an MLP.
      dtype: what the layers compute in.

    Returns:
      A network from ``[n, height, width, channels]`` images to `Outputs` with ``[n, k]`` logits.

    Raises:
      ValueError: if the name or the stem is unknown, or ``image_shape`` has not three entries.

    Example:
      >>> from flax import nnx
      >>> net = build("mlp-64-32", num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
      >>> [layer.out_features for layer in net.hidden]
      [64, 32]
    """
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (height, width, channels), got {image_shape}")
    if re.fullmatch(r"mlp(-\d+)+", name):
        make = partial(_build_mlp, partial(MLP, [int(width) for width in name.split("-")[1:]]))
    elif name in MODELS:
        make = MODELS[name]
    else:
        nearest = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
        raise ValueError(
            f"unknown network {name!r}; {hint}"
            f"there are {', '.join(MODELS)} and mlp-<width>-<width>..."
        )
    return make(num_classes, image_shape=image_shape, stem=stem, dtype=dtype, rngs=rngs)


class MLP(nnx.Module):
    """A multi-layer perceptron on flattened images: ReLU hidden layers and a linear head.

    The features ``[n, d]``, d = widths[-1], are the last hidden layer's outputs, after its ReLU.

    Args:
      widths: number of units of each hidden layer, at least one layer.
      num_classes: number k of logits.
      in_features: number of values in one example, e.g. 784 for an image of 28 x 28.
      dtype: what the hidden layers compute in.
      rngs: keys for the initial parameters.

    Raises:
      ValueError: if ``widths`` is empty or holds a number below 1; at the call, if an example
        does not hold ``in_features`` values.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> out = MLP((64, 32), 10, in_features=64, rngs=nnx.Rngs(0))(jnp.ones((5, 8, 8, 1)))
      >>> out.features.shape, out.logits.shape, out.maps
      ((5, 32), (5, 10), ())
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        in_features: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be positive numbers, at least one, got {widths}")
        self.in_features = in_features
        self.hidden = List(
            dense(fan_in, fan_out, dtype, rngs)
            for fan_in, fan_out in itertools.pairwise((in_features, *widths))
        )
        self.fc = head(widths[-1], num_classes, dtype, rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Maps ``[n, ...]`` examples to ``Outputs``, without maps."""
        if math.prod(x.shape[1:]) != self.in_features:
            raise ValueError(f"expected {self.in_features} values an example, got {x.shape[1:]}")
        x = x.reshape(len(x), -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        features = x.astype(self.fc.dtype)
        return Outputs(features, self.fc(features))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut, ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``.

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
        """Maps ``[n, h, w, in_width]`` to ``[n, h / stride, w / stride, width]``."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(x + y).astype(self.dtype)


class Bottleneck(nnx.Module):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut, four times as wide at its ends.

    Arguments and errors as of `BasicBlock`; the output is ``[n, h, w, 4 * width]``.

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
        """Maps ``[n, h, w, in_width]`` to ``[n, h / stride, w / stride, 4 * width]``."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(x + y).astype(self.dtype)


class ResNet(nnx.Module):
    """A residual network: a stem, stages of blocks, global average pooling, a linear head.

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
        self.stages = List()
        in_width = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths[1:], strict=True)):
            blocks = List()
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(in_width, width, stride, dtype=dtype, rngs=rngs))
                in_width = block.expansion * width
            self.stages.append(blocks)
        self.fc = head(in_width, num_classes, dtype, rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Maps ``[n, h, w, in_channels]`` images to ``Outputs``, with one map per stage."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"expected images [n, h, w, {self.in_channels}], got {x.shape}")
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


def _build_resnet(
    make: Callable[..., ResNet],
    num_classes: int,
    *,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
) -> ResNet:
    return make(num_classes, in_channels=image_shape[-1], stem=stem, dtype=dtype, rngs=rngs)


def _build_mlp(
    make: Callable[..., MLP],
    num_classes: int,
    *,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
) -> MLP:
    del stem  # it means nothing to an MLP
    return make(num_classes, in_features=math.prod(image_shape), dtype=dtype, rngs=rngs)


def _named(network: type, *arguments, features: int) -> Callable[..., Any]:
    make = partial(network, *arguments)
    given = ", ".join(getattr(a, "__name__", str(a)) for a in arguments)
    make.__doc__ = f"""``{network.__name__}({given}, ...)``, features ``[n, {features}]``.

    `{network.__name__}` says the rest: its other arguments, shapes and errors.
    """
    return make


resnet18 = _named(ResNet, BasicBlock, (2, 2, 2, 2), (64, 64, 128, 256, 512), features=512)
resnet34 = _named(ResNet, BasicBlock, (3, 4, 6, 3), (64, 64, 128, 256, 512), features=512)
resnet50 = _named(ResNet, Bottleneck, (3, 4, 6, 3), (64, 64, 128, 256, 512), features=2048)
resnet8 = _named(ResNet, BasicBlock, (1, 1, 1), (16, 16, 32, 64), features=64)
resnet20 = _named(ResNet, BasicBlock, (3, 3, 3), (16, 16, 32, 64), features=64)
resnet56 = _named(ResNet, BasicBlock, (9, 9, 9), (16, 16, 32, 64), features=64)
resnet8x4 = _named(ResNet, BasicBlock, (1, 1, 1), (32, 64, 128, 256), features=256)
resnet32x4 = _named(ResNet, BasicBlock, (5, 5, 5), (32, 64, 128, 256), features=256)
# The networks of the paper's MNIST experiment, 784-512-256-128-128-128-10 and 784-512-256-128-10.
mlp_teacher = _named(MLP, (512, 256, 128, 128, 128), features=128)
mlp_student = _named(MLP, (512, 256, 128), features=128)

# Name -> constructor ``(num_classes, *, image_shape, rngs, stem="cifar", dtype=jnp.float32)``.
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "resnet18": partial(_build_resnet, resnet18),
    "resnet34": partial(_build_resnet, resnet34),
    "resnet50": partial(_build_resnet, resnet50),
    "resnet8": partial(_build_resnet, resnet8),
    "resnet20": partial(_build_resnet, resnet20),
    "resnet56": partial(_build_resnet, resnet56),
    "resnet8x4": partial(_build_resnet, resnet8x4),
    "resnet32x4": partial(_build_resnet, resnet32x4),
    "mlp-teacher": partial(_build_mlp, mlp_teacher),
    "mlp-student": partial(_build_mlp, mlp_student),
}
