"""Networks by name: published sizes, small images, and names that are not there."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kd2m_jax import models

DIGITS = (8, 8, 1)


def abstract(name, num_classes=10, image_shape=DIGITS, **options):
    """Make a network without values, at no cost."""
    return nnx.eval_shape(
        lambda: models.build(
            name, num_classes=num_classes, image_shape=image_shape, rngs=nnx.Rngs(0), **options
        )
    )


def wide(blocks, widen):
    """Count a wide ResNet's parameters for 100 classes by hand."""
    count, before = 9 * 3 * 16, 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        shortcut = before * width if before != width else 0
        count += 2 * before + 9 * before * width + 2 * width + 9 * width**2 + shortcut
        count += (blocks - 1) * (4 * width + 18 * width**2)
        before = width
    return count + 2 * before + 100 * before + 100


def test_the_wide_counts_are_the_tables():
    assert [round(wide(*one) / 1e6, 2) for one in ((6, 2), (2, 2), (6, 1))] == [2.26, 0.7, 0.57]


# torchvision documents its counts ("num_params"). For the CIFAR family with 100 classes the
# papers print 0.08M, 0.28M, 0.86M, 1.23M, 7.43M. By hand for resnet8, 9io a 3x3 convolution
# and 2w a normalisation:
#   stem 9*3*16 + 32 = 464; stage one 2*(9*16*16 + 32) = 4,672;
#   stage two 9*16*32 + 9*32*32 + 16*32 + 3*64 = 14,528; three, the same at 32-64, 57,728;
#   head 64*100 + 100 = 6,500; in all 83,892. Every further block of width w adds 18w^2 + 4w.
@pytest.mark.parametrize(
    ("name", "num_classes", "image_shape", "stem", "count"),
    [
        ("resnet18", 1000, (224, 224, 3), "imagenet", 11_689_512),
        ("resnet34", 1000, (224, 224, 3), "imagenet", 21_797_672),
        ("resnet50", 1000, (224, 224, 3), "imagenet", 25_557_032),
        ("resnet101", 1000, (224, 224, 3), "imagenet", 44_549_160),
        ("mobilenetv2", 1000, (224, 224, 3), "imagenet", 3_504_872),
        ("mobilenetv2", 1000, (32, 32, 3), "cifar", 3_504_872),
        ("vit-tiny", 1000, (224, 224, 3), "imagenet", 5_717_416),
        # Tian et al. (CRD), CIFAR-100: 3.97M, 9.46M, 2.26M, 0.70M, 0.57M; to the last by hand.
        ("vgg8", 100, (32, 32, 3), "cifar", 3_965_028),
        ("vgg13", 100, (32, 32, 3), "cifar", 9_462_180),
        ("wrn-40-2", 100, (32, 32, 3), "cifar", wide(6, 2)),
        ("wrn-16-2", 100, (32, 32, 3), "cifar", wide(2, 2)),
        ("wrn-40-1", 100, (32, 32, 3), "cifar", wide(6, 1)),
        ("resnet18", 1000, (32, 32, 3), "cifar", 11_689_512 - (49 - 9) * 3 * 64),
        ("resnet8", 100, (32, 32, 3), "cifar", 83_892),
        ("resnet20", 100, (32, 32, 3), "cifar", 83_892 + 2 * (18 * 5376 + 4 * 112)),
        ("resnet56", 100, (32, 32, 3), "cifar", 83_892 + 8 * (18 * 5376 + 4 * 112)),
        ("resnet8x4", 100, (32, 32, 3), "cifar", 1_233_540),
        ("resnet32x4", 100, (32, 32, 3), "cifar", 1_233_540 + 4 * (18 * 86016 + 4 * 448)),
        ("mlp-teacher", 10, (28, 28, 1), "cifar", 600_458),
        ("mlp-student", 10, (28, 28, 1), "cifar", 567_434),
        ("mlp-64-32", 10, DIGITS, "cifar", 64 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10),
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, image_shape, stem, count):
    params = nnx.state(abstract(name, num_classes, image_shape, stem=stem), nnx.Param)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", "imagenet"),
        ("resnet8x4", "cifar"),
        ("wrn-16-2", "cifar"),
        ("vgg8", "cifar"),
        ("mobilenetv2", "cifar"),
        ("vit-tiny", "cifar"),
        ("mlp-teacher", "cifar"),
    ],
)
def test_digits_are_large_enough(name, stem):
    def outputs():
        options = {"num_classes": 10, "image_shape": DIGITS, "stem": stem}
        return models.build(name, **options, rngs=nnx.Rngs(0))(jnp.ones((4, *DIGITS)))

    assert nnx.eval_shape(outputs).logits.shape == (4, 10)


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(ValueError, match=r"unknown network 'resnet43'; nearest: resnet34"):
        abstract("resnet43")
    with pytest.raises(ValueError, match=r"unknown network 'xyz'; there are resnet18, "):
        abstract("xyz")
    for name in ("mlp", "mlp-", "mlp-64-", "mlp--3", "mlp-6x"):
        with pytest.raises(ValueError, match="unknown network"):
            abstract(name)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(height, width, channels\), got \(8, 8\)"):
        abstract("resnet8", image_shape=(8, 8))
    with pytest.raises(ValueError, match=r'"cifar" or "imagenet", got \'resnet\''):
        abstract("resnet8", stem="resnet")
    for name in ("mobilenetv2", "vit-tiny"):
        with pytest.raises(ValueError, match=r'"cifar" or "imagenet", got \'resnet\''):
            abstract(name, stem="resnet")
    with pytest.raises(ValueError, match=r"depth must be 10, 16, 22, ... and widen >= 1, got 17"):
        abstract("wrn-17-2")
    with pytest.raises(ValueError, match="must be multiples of the patch 16"):
        abstract("vit-tiny", stem="imagenet")
    with pytest.raises(ValueError, match="8 pixels a side at least"):
        abstract("vgg8")(jnp.ones((2, 4, 4, 1)))
    with pytest.raises(ValueError, match=r"at least one, got \[64, 0\]"):
        abstract("mlp-64-0")
    with pytest.raises(ValueError, match=r"expected 64 values per example, got \(8, 8, 3\)"):
        abstract("mlp-4")(jnp.ones((2, 8, 8, 3)))


@pytest.mark.parametrize("name", ["mlp-8-4", "resnet8"])
def test_inputs_that_are_several_arrays_are_named(name):
    net = models.build(name, num_classes=3, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"(MLP|ResNet) takes one array, got a dict"):
        net({"ids": jnp.ones((2, 8, 8, 1)), "mask": jnp.ones((2, 8, 8, 1))})
