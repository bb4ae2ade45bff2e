"""The further networks against their definition, written out with lax and NumPy, and learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kd2m_jax import fit, models


def made(name, size=32, channels=3, classes=5, **options):
    shape = (size, size, channels)
    net = models.build(name, num_classes=classes, image_shape=shape, rngs=nnx.Rngs(0), **options)
    # Statistics and shifts that are not those of a new network.
    rng = np.random.default_rng(0)

    def drawn(draw):
        return lambda leaf: leaf + 0.02 * draw(leaf.shape).astype(np.float32)

    nnx.update(net, jax.tree.map(drawn(rng.standard_normal), nnx.state(net, nnx.Param)))
    nnx.update(net, jax.tree.map(drawn(rng.random), nnx.state(net, nnx.BatchStat)))
    net.eval()
    return net, rng.normal(size=(2, *shape)).astype(np.float32)


def convolved(x, layer, stride=1, groups=1):
    kernel = np.asarray(layer.kernel[...])
    pad = kernel.shape[0] // 2
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return np.asarray(y) if layer.bias is None else np.asarray(y) + np.asarray(layer.bias[...])


def normed(x, layer):
    scale, bias, mean, var = (
        np.asarray(v[...]) for v in (layer.scale, layer.bias, layer.mean, layer.var)
    )
    return (x - mean) * (scale / np.sqrt(var + 1e-5)) + bias


def relu(x):
    return np.maximum(x, 0)


def check(net, x, features):
    out, features = net(x), np.asarray(features)
    np.testing.assert_allclose(out.features, features, rtol=1e-4, atol=1e-4)
    logits = features @ np.asarray(net.fc.kernel[...]) + np.asarray(net.fc.bias[...])
    np.testing.assert_allclose(out.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_wide_resnet():
    """Pre-activation: where shapes change both ways begin with the normalised input."""
    net, x = made("wrn-16-2", size=8)
    y = convolved(x, net.conv1)
    for stage, blocks in enumerate(net.stages):
        for i, block in enumerate(blocks):
            stride = 2 if stage and i == 0 else 1
            before = relu(normed(y, block.bn1))
            inner = relu(normed(convolved(before, block.conv1, stride), block.bn2))
            inner = convolved(inner, block.conv2)
            y = inner + (convolved(before, block.shortcut[0], stride) if block.shortcut else y)
    y = relu(normed(y, net.bn1))
    check(net, x, y.mean((1, 2)))


@pytest.mark.slow
def test_a_vgg():
    net, x = made("vgg13", size=16)
    y = x
    for number, layers in enumerate(net.blocks):
        for i in range(0, len(layers), 2):
            y = relu(normed(convolved(y, layers[i]), layers[i + 1]))
        if number < 3:
            n, h, w, c = y.shape
            y = np.asarray(y).reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
    check(net, x, np.asarray(y).mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_mobilenet(stem):
    def relu6(x):
        return np.clip(x, 0, 6)

    net, x = made("mobilenetv2", size=32, stem=stem)
    small = stem == "cifar"
    y = relu6(normed(convolved(x, net.conv1, 1 if small else 2), net.bn1))
    strides = (1, 1 if small else 2, 2, 2, 1, 2, 1)
    for blocks, first in zip(net.stages, strides, strict=True):
        for i, block in enumerate(blocks):
            z = y
            if len(block.widen):
                z = relu6(normed(convolved(z, block.widen[0]), block.widen[1]))
            stride, width = (first if i == 0 else 1), z.shape[-1]
            z = relu6(normed(convolved(z, block.depthwise, stride, width), block.bn1))
            z = normed(convolved(z, block.narrow), block.bn2)
            y = y + z if stride == 1 and y.shape == z.shape else z
    y = relu6(normed(convolved(y, net.conv2), net.bn2))
    assert y.shape[1:3] == ((4, 4) if small else (1, 1))
    check(net, x, np.asarray(y).mean((1, 2)))


@pytest.mark.slow
def test_a_vision_transformer():
    net, x = made("vit-tiny", size=8)

    def dense(x, layer):
        return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])

    def layer_norm(x, layer):
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return z * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    kernel = np.asarray(net.patches.kernel[...], np.float64)
    cut = x.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 48)
    tokens = cut @ kernel.reshape(48, 192) + np.asarray(net.patches.bias[...])
    first = np.broadcast_to(np.asarray(net.token[...]), (2, 1, 192))
    y = np.concatenate([first, tokens], 1) + np.asarray(net.places[...])
    for block in net.blocks:
        q, k, v = np.split(dense(layer_norm(y, block.norm1), block.qkv), 3, axis=-1)
        heads = []
        for h in range(3):
            part = slice(64 * h, 64 * h + 64)
            weights = softmax(q[..., part] @ k[..., part].swapaxes(1, 2) / 8)
            heads.append(weights @ v[..., part])
        y = y + dense(np.concatenate(heads, -1), block.proj)
        y = y + dense(
            np.asarray(jax.nn.gelu(dense(layer_norm(y, block.norm2), block.up), approximate=False)),
            block.down,
        )
    check(net, x, layer_norm(y, net.norm)[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrn-10-1", "vgg8", "mobilenetv2", "vit-tiny"])
def test_they_learn(name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8, 8, 1)).astype(np.float32)
    labels = np.arange(32) % 2
    x += 2.0 * labels[:, None, None, None]
    net = models.build(name, num_classes=2, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    options = {"batch_size": 32, "epochs": 6, "optimizer": optax.adam(1e-3), "log_every": 1}
    losses = [r["loss"] for r in fit(net, (x, labels), **options).history]
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrn-10-1", "vgg8", "mobilenetv2", "vit-tiny"])
def test_in_half_precision_features_and_logits_stay_in_full(name):
    def outputs():
        options = {"num_classes": 2, "image_shape": (8, 8, 1), "dtype": jnp.bfloat16}
        return models.build(name, **options, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 1)))

    out = nnx.eval_shape(outputs)
    assert out.features.dtype == out.logits.dtype == jnp.float32
    assert all(m.dtype == jnp.bfloat16 for m in out.maps)
