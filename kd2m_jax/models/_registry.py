"""Networks by name, for whoever has a name and the shape of an image: the command line first."""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd2m_jax.models import _mlp, _mobilenet, _resnet, _vgg, _vit, _wide_resnet


def _build_resnet(
    make: Callable[..., nnx.Module],
    num_classes: int,
    *,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
) -> nnx.Module:
    return make(num_classes, in_channels=image_shape[-1], stem=stem, dtype=dtype, rngs=rngs)


def _build_mlp(
    make: Callable[..., _mlp.MLP],
    num_classes: int,
    *,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
) -> _mlp.MLP:
    del stem  # it means nothing to an MLP
    return make(num_classes, in_features=math.prod(image_shape), dtype=dtype, rngs=rngs)


def _build_small(
    make: Callable[..., nnx.Module],
    num_classes: int,
    *,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
) -> nnx.Module:
    del stem  # these are for small images alone
    return make(num_classes=num_classes, in_channels=image_shape[-1], dtype=dtype, rngs=rngs)


def _build_vit(
    num_classes: int,
    *,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
) -> _vit.ViT:
    patch = {"cifar": 4, "imagenet": 16}.get(stem)
    if patch is None:
        raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}')
    shape = (image_shape[0], image_shape[1], image_shape[2])
    return _vit.ViT(num_classes, image_shape=shape, patch=patch, dtype=dtype, rngs=rngs)


# Name -> constructor ``(num_classes, *, image_shape, rngs, stem="cifar", dtype=jnp.float32)``.
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "resnet18": partial(_build_resnet, _resnet.resnet18),
    "resnet34": partial(_build_resnet, _resnet.resnet34),
    "resnet50": partial(_build_resnet, _resnet.resnet50),
    "resnet101": partial(_build_resnet, _resnet.resnet101),
    "resnet8": partial(_build_resnet, _resnet.resnet8),
    "resnet20": partial(_build_resnet, _resnet.resnet20),
    "resnet56": partial(_build_resnet, _resnet.resnet56),
    "resnet8x4": partial(_build_resnet, _resnet.resnet8x4),
    "resnet32x4": partial(_build_resnet, _resnet.resnet32x4),
    "vgg8": partial(_build_small, partial(_vgg.VGG, (1, 1, 1, 1, 1))),
    "vgg13": partial(_build_small, partial(_vgg.VGG, (2, 2, 2, 2, 2))),
    "mobilenetv2": partial(_build_resnet, _mobilenet.MobileNetV2),
    "vit-tiny": _build_vit,
    "mlp-teacher": partial(_build_mlp, _mlp.mlp_teacher),
    "mlp-student": partial(_build_mlp, _mlp.mlp_student),
}


def build(
    name: str,
    *,
    num_classes: int,
    image_shape: Sequence[int],
    rngs: nnx.Rngs,
    stem: str = "cifar",
    dtype: DTypeLike = jnp.float32,
) -> nnx.Module:
    """Build a network by its name.

    Args:
      name: a name of ``MODELS``, or ``mlp-<width>-<width>...`` for a :class:`MLP` with these
        hidden layers, e.g. ``mlp-64-32``, or ``wrn-<depth>-<widen>`` for a :class:`WideResNet`,
        e.g. ``wrn-40-2``.
      num_classes: number k of logits.
      image_shape: ``(height, width, channels)`` of one image.
      rngs: keys for the initial parameters.
      stem: "cifar" or "imagenet", see :class:`ResNet`; of ``vit-tiny`` patches of 4 or 16 pixels.
        It means nothing to an MLP, a VGG and a wide ResNet.
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
        widths = [int(width) for width in name.split("-")[1:]]
        make = partial(_build_mlp, partial(_mlp.MLP, widths))
    elif re.fullmatch(r"wrn-\d+-\d+", name):
        depth, widen = map(int, name.split("-")[1:])
        make = partial(_build_small, partial(_wide_resnet.WideResNet, depth, widen))
    elif name in MODELS:
        make = MODELS[name]
    else:
        nearest = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
        raise ValueError(
            f"unknown network {name!r}; {hint}"
            f"there are {', '.join(MODELS)}, wrn-<depth>-<widen> and mlp-<width>-<width>..."
        )
    return make(num_classes, image_shape=image_shape, stem=stem, dtype=dtype, rngs=rngs)
