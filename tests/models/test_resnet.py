"""Residual networks: shapes, precision, and what the training step does to them."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kd2m_jax import models

DIGITS = (8, 8, 1)


@pytest.fixture(scope="module")
def make_small_net():
    """Make a constructor of small ResNets, compiled because eager initialisation takes seconds."""

    def make(dtype):
        widths = (8, 8, 16)
        rngs = nnx.Rngs(0)
        return models.ResNet(
            models.BasicBlock, (1, 1), widths, 10, in_channels=1, dtype=dtype, rngs=rngs
        )

    compiled = nnx.jit(make, static_argnums=0)
    return lambda dtype=jnp.float32: compiled(dtype)


@nnx.jit
def forward(model, x):
    return model(x)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, *DIGITS))


@pytest.mark.parametrize(
    ("name", "stem", "sides", "widths"),
    [
        ("resnet18", "cifar", (32, 16, 8, 4), (64, 128, 256, 512)),
        ("resnet34", "imagenet", (8, 4, 2, 1), (64, 128, 256, 512)),
        ("resnet50", "cifar", (32, 16, 8, 4), (256, 512, 1024, 2048)),
        ("resnet20", "cifar", (32, 16, 8), (16, 32, 64)),
        ("resnet32x4", "cifar", (32, 16, 8), (64, 128, 256)),
    ],
)
def test_outputs_have_one_map_per_stage(name, stem, sides, widths):
    def outputs():
        options = {"num_classes": 7, "image_shape": (32, 32, 3), "stem": stem}
        return models.build(name, **options, rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3)))

    out = nnx.eval_shape(outputs)
    assert [m.shape for m in out.maps] == [(2, s, s, w) for s, w in zip(sides, widths, strict=True)]
    assert out.features.shape == (2, widths[-1])
    assert out.logits.shape == (2, 7)


def test_features_are_the_pooled_last_map_and_logits_their_linear_image(make_small_net, images):
    model = make_small_net()
    out = forward(model, images)
    np.testing.assert_allclose(out.features, out.maps[-1].mean((1, 2)), atol=1e-6)
    kernel, bias = np.asarray(model.fc.kernel[...]), np.asarray(model.fc.bias[...])
    logits = np.asarray(out.features) @ kernel + bias
    np.testing.assert_allclose(out.logits, logits, atol=1e-5)


def test_convolutions_start_he_normal_over_their_outputs(make_small_net):
    kernel = np.asarray(make_small_net().stages[1][0].conv1.kernel[...])  # [3, 3, 8, 16]
    assert np.isclose(kernel.std(), math.sqrt(2 / (9 * 16)), rtol=0.06)
    # A normal distribution that is not cut off at two standard deviations.
    assert np.abs(kernel).max() > 2.5 * kernel.std()


def test_training_moves_the_running_statistics_and_eval_uses_them(make_small_net, images):
    model = make_small_net()
    x = model.conv1(images)
    forward(model, images)
    np.testing.assert_allclose(model.bn1.mean[...], 0.1 * x.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(model.bn1.var[...], 0.9 + 0.1 * x.var((0, 1, 2)), atol=1e-6)
    model.eval()
    statistics = nnx.state(model, nnx.BatchStat)
    alone, together = forward(model, images[:1]), forward(model, images)
    np.testing.assert_allclose(alone.logits, together.logits[:1], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, statistics, nnx.state(model, nnx.BatchStat))


def test_a_merged_copy_trains_without_touching_the_original(make_small_net, images):
    model = make_small_net()
    graphdef, params, rngs, state = nnx.split(model, nnx.Param, nnx.RngState, ...)
    assert not jax.tree.leaves(rngs)

    @jax.jit
    def step(params, state):
        def loss(params):
            net = nnx.merge(graphdef, params, rngs, state, copy=True)
            net.train()
            logits = net(images).logits
            return -jax.nn.log_softmax(logits)[:, 3].mean(), nnx.state(net, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    grads, new_state = step(params, state)
    # Every parameter takes part.
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))
    assert (model.bn1.mean[...] == 0).all()
    assert (new_state["bn1"]["mean"][...] != 0).all()


def test_graph_definitions_do_not_depend_on_the_seed():
    # Otherwise every new network would compile anew, and students could not be stacked.
    first, second = (
        nnx.split(nnx.eval_shape(lambda: models.resnet20(10, rngs=nnx.Rngs(seed))))[0]  # noqa: B023
        for seed in (0, 1)
    )
    assert first == second and hash(first) == hash(second)


def test_batch_statistics_can_be_synchronised_from_outside(make_small_net, images):
    model = make_small_net()
    whole = forward(model, images).logits
    graphdef, state = nnx.split(model)

    @partial(jax.jit, static_argnums=1)
    def in_shards(shards, axis_name):
        def one(x):
            net = nnx.merge(graphdef, state, copy=True)
            for _, module in nnx.iter_graph(net):
                if isinstance(module, nnx.BatchNorm):
                    module.axis_name = axis_name
            return net(x).logits

        return jax.vmap(one, axis_name="devices")(shards).reshape(whole.shape)

    shards = images.reshape(2, 4, *DIGITS)
    np.testing.assert_allclose(in_shards(shards, "devices"), whole, atol=1e-4)
    assert np.abs(in_shards(shards, None) - whole).max() > 1e-2


def test_bfloat16_computes_in_it_and_keeps_float32(make_small_net, images):
    model, exact = make_small_net(jnp.bfloat16), make_small_net()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    out, expected = forward(model, images), forward(exact, images)
    assert out.features.dtype == out.logits.dtype == jnp.float32
    assert {m.dtype for m in out.maps} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(out.features, expected.features, atol=0.05)
    assert (out.features != expected.features).any()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


def test_bfloat16_does_not_round_the_running_statistics():
    model = models.ResNet(models.BasicBlock, (), (4,), 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model.eval()
    # In bfloat16 this mean would be 1, and all activations 0.
    model.bn1.mean[...] = jnp.full(4, 1 - 2**-10, jnp.float32)
    model.bn1.bias[...] = jnp.ones(4)
    features = model(jnp.zeros((1, 8, 8, 3))).features
    np.testing.assert_allclose(features, 2**-10, rtol=0.01)


def test_wrong_arguments_are_named():
    make = partial(models.resnet8, 10, in_channels=1)
    with pytest.raises(ValueError, match=r'"cifar" or "imagenet", got \'resnet\''):
        make(stem="resnet", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"so 2 numbers for depths \(1,\), got \(4,\)"):
        models.ResNet(models.BasicBlock, (1,), (4,), 10, rngs=nnx.Rngs(0))
    net = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"\[n, h, w, 1\], got \(2, 8, 8, 3\)"):
        net(jnp.ones((2, 8, 8, 3)))
