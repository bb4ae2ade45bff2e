"""Other people's networks, unedited, as students and teachers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from foreign import LinenResNet, NnxResNet, NnxViT, equinox_net

import kd2m_jax
from kd2m_jax import capture, fit, from_equinox, layers, models, predict, restore

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 8, 8, 1)).astype(np.float32)
Y = (np.arange(32) % 3).astype(np.int32)
X += Y[:, None, None, None]


def resnet(seed=0):
    return NnxResNet(rngs=nnx.Rngs(seed))


def vit(seed=0):
    return NnxViT(rngs=nnx.Rngs(seed))


LINEN = LinenResNet()
VARIABLES = LINEN.init(jax.random.key(0), X, train=False)
READINGS = {
    "resnet": lambda: capture(resnet(), features="blocks.1", maps=("blocks.0", "blocks.1")),
    "resnet-fc": lambda: capture(resnet(), features="stem", logits="fc"),
    "vit-token": lambda: capture(vit(), features="norm", pool="first"),
    "vit-mean": lambda: capture(vit(), features="layers.0"),
    "linen": lambda: capture(LINEN, VARIABLES, features="block1", logits="fc", maps=("block0",)),
    "linen-layers": lambda: capture(LINEN, VARIABLES, features="blocks.1", logits="fc"),
}


def by_hand(name):
    """Return what the layers give, computed without `capture`."""
    if name.startswith("linen"):
        act = LINEN.apply(VARIABLES, X, train=False)
        return act["block1"].mean((1, 2)), act["fc"]
    net = resnet() if name.startswith("resnet") else vit()
    net.eval()
    logits = net(X)
    if name.startswith("resnet"):
        stem = net.stem(X)
        deep = net.blocks[1](net.blocks[0](stem))
        return (deep if name == "resnet" else stem).mean((1, 2)), logits
    tokens = net.patch(X).reshape(len(X), -1, 16)
    token = jnp.broadcast_to(net.token[...], (len(X), 1, 16))
    first = net.layers[0](jnp.concatenate([token, tokens], axis=1))
    if name == "vit-mean":
        return first.mean(1), logits
    return net.norm(net.layers[1](first))[:, 0], logits


@pytest.mark.parametrize("name", READINGS)
def test_captured_outputs_are_the_layers(name):
    network = READINGS[name]()
    out, _ = network.apply(*network.variables, X, train=False)
    features, logits = by_hand(name)
    np.testing.assert_allclose(out.features, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.logits, logits, rtol=1e-4, atol=1e-5)
    if name in ("resnet", "linen"):
        assert out.maps[0].shape == (32, 8, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "resnet" else pytest.mark.slow) for n in READINGS]
)
def test_twenty_steps_unedited(name):
    """As a student and as a teacher; what comes back is the caller's own kind of model."""
    network = READINGS[name]()
    before = [np.array(leaf) for leaf in jax.tree.leaves(network.variables)]
    teacher = models.MLP((16, 8), 3, in_features=64, rngs=nnx.Rngs(1))
    options = {"batch_size": 16, "epochs": 10, "optimizer": optax.adam(3e-3)}
    result = fit(network, (X, Y), teacher=teacher, metric="mmd-rbf@logits", coef=0.1, **options)
    losses = [record["loss"] for record in result.history]
    assert result.history[-1]["step"] == 20 and losses[-1] < losses[0]
    for leaf, old in zip(jax.tree.leaves(network.variables), before, strict=True):
        np.testing.assert_array_equal(leaf, old)  # left as it is
    if name.startswith("linen"):
        assert set(result.student) == {"params", "batch_stats"}
        LINEN.apply(result.student, X, train=False)
    else:
        assert type(result.student) in (NnxResNet, NnxViT)
        assert result.student(X).shape == (32, 3)
    student = models.MLP((16, 8), 3, in_features=64, rngs=nnx.Rngs(2))
    taught = fit(student, (X, Y), teacher=network, metric="kd", **options | {"epochs": 1})
    assert np.isfinite(taught.history[-1]["loss"])


@pytest.mark.slow
def test_the_captured_students_batch_statistics_move_and_its_checkpoint_is_read(tmp_path):
    network = capture(resnet(), features="blocks.1")
    options = {"batch_size": 16, "epochs": 2, "optimizer": optax.sgd(0.05)}
    trained = fit(network, (X, Y), checkpoint_dir=tmp_path, **options).student
    assert np.any(trained.blocks[0].norm.mean[...] != resnet().blocks[0].norm.mean[...])
    again = restore(tmp_path, network)
    np.testing.assert_array_equal(again(X), trained(X))
    np.testing.assert_allclose(predict(capture(again, features="stem"), X), trained(X), rtol=1e-5)


@pytest.mark.slow
def test_four_devices_give_what_one_gives():
    still = NnxResNet(rate=0.0, rngs=nnx.Rngs(0))  # dropout draws apart
    for network in (capture(still, features="blocks.1"), READINGS["linen-layers"]()):
        options = {"batch_size": 16, "epochs": 1, "optimizer": optax.sgd(0.05)}
        one, four = (
            fit(network, (X, Y), devices=jax.devices()[:n], **options).history for n in (1, 4)
        )
        np.testing.assert_allclose(one[-1]["loss"], four[-1]["loss"], rtol=1e-4)


def test_layers_prints_the_paths(capsys):
    layers(resnet(), X)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: (line[1], " ".join(line[2:])) for line in lines}
    assert shown["blocks.1"] == ("Block", "[32, 4, 4, 16]")
    assert shown["blocks.0.conv"] == ("Conv", "[32, 8, 8, 8]") and shown["fc"][1] == "[32, 3]"
    layers(LINEN, X)
    out = capsys.readouterr().out
    assert "blocks_1" in out and "[32, 8, 8, 16]" in out and "fc" in out
    with pytest.raises(TypeError, match="takes an NNX or a Linen module, got int"):
        layers(3, X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: capture(resnet(), features="block.1"), "no layer 'block.1': did you mean blocks"),
        (lambda: capture(resnet(), features="blocks.7"), "no layer 'blocks.7': did you mean"),
        (lambda: capture(LINEN, VARIABLES, features="blok1", logits="fc"), "did you mean block1"),
        (lambda: capture(LINEN, VARIABLES, features="block1"), "is a dict of conv1, block0"),
        (lambda: capture(resnet(), features="stem", logits="stem"), r"'stem' is \[32, 8, 8, 8\]"),
        (lambda: capture(resnet(), features="fc", maps=("fc",)), r"'fc' is \[32, 3\]"),
        (lambda: capture(resnet(), features="stem", pool="first"), r"must be \[n, t, d\]"),
        (lambda: capture(resnet(), features="stem", pool="max"), "unknown pool 'max'"),
        (lambda: capture(vit(), features="layers.0.attend.dropout"), "has no layer"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        network = make()
        network.apply(*network.variables, X, train=False)


def test_a_layer_that_is_not_called():
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.used, self.unused = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.used(x)

    network = capture(Odd(nnx.Rngs(0)), features="unused")
    with pytest.raises(ValueError, match="layer 'unused' is not called"):
        network.apply(*network.variables, jnp.ones((2, 4)), train=False)
    with pytest.raises(TypeError, match="capture takes an NNX or a Linen module, got function"):
        capture(lambda x: x, features="x")


# --- Equinox -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_equinox_network():
    eqx = pytest.importorskip("equinox")
    net, state = equinox_net(jax.random.key(0))
    network = from_equinox(net, state)
    frozen = eqx.nn.inference_mode(net)
    call = jax.vmap(lambda x: frozen(x, state)[0], axis_name="batch")
    features, logits = call(X)
    got = kd2m_jax.outputs(network, X)
    np.testing.assert_allclose(got.features, features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.logits, logits, rtol=1e-5, atol=1e-6)

    teacher = models.MLP((16, 8), 3, in_features=64, rngs=nnx.Rngs(1))
    options = {"batch_size": 16, "epochs": 10, "optimizer": optax.adam(3e-3), "log_every": 2}
    result = fit(network, (X, Y), teacher=teacher, metric="kd", coef=0.1, **options)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    trained, its_state = result.student
    assert isinstance(trained, eqx.Module)
    mapped = jax.vmap(lambda x: trained(x, its_state)[0][1], axis_name="batch")
    assert np.mean(mapped(X).argmax(1) == Y) > 0.5
    student = models.MLP((16, 8), 3, in_features=64, rngs=nnx.Rngs(2))
    fit(student, (X, Y), teacher=network, metric="kd", **options | {"epochs": 1})


def test_a_plain_equinox_network_and_its_mistakes():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"Linear must return \(features, logits\) for one example"):
        from_equinox(net).apply(net, None, jnp.ones((2, 4)), train=False)
    with pytest.raises(TypeError, match="takes an Equinox module, got function"):
        from_equinox(lambda x: x)


class Turned(nnx.Module):
    """Its layer sees two time steps before the batch."""

    def __init__(self, rngs):
        self.a, self.fc = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.a(jnp.stack([x, x])).mean(0))


class Compiled(Turned):
    @nnx.jit
    def __call__(self, x):
        return self.fc(self.a(x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dense(5, name="hidden")(x))


@pytest.mark.slow
def test_what_cannot_be_read_is_named_with_the_layer():
    x = jnp.ones((8, 6))
    for network, message in (
        (capture(Turned(nnx.Rngs(0)), features="a"), r"'a' gives \[2, 8, 5\] for 8 rows"),
        (capture(Compiled(nnx.Rngs(0)), features="a"), "'a' is called inside nnx.scan, nnx.jit"),
        (capture(Plain(), Plain().init(jax.random.key(0), x), features="hiden"), "hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            kd2m_jax.outputs(network, x)


@pytest.mark.slow
def test_a_capture_of_linen_is_restored_without_variables(tmp_path):
    x, labels = jnp.ones((8, 6)), jnp.arange(8) % 3
    options = {"epochs": 1, "batch_size": 8, "checkpoint_dir": tmp_path}
    network = capture(Plain(), features="hidden")
    trained = kd2m_jax.fit(network, (x, labels), **options).student
    chex.assert_trees_all_equal(kd2m_jax.restore(tmp_path, network), trained)


def test_a_module_is_no_variables():
    net = Turned(nnx.Rngs(0))
    with pytest.raises(TypeError, match="a trained module is the model itself"):
        kd2m_jax.predict(capture(net, features="a"), jnp.ones((8, 6)), variables=net)


@pytest.mark.slow
def test_predict_takes_a_network_that_returns_its_logits_alone():
    x = jnp.ones((8, 6))
    net, module = Turned(nnx.Rngs(0)), Plain()
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_allclose(predict(net, x), net(x), rtol=1e-5)
    found = predict(module, x, variables=variables)
    np.testing.assert_allclose(found, module.apply(variables, x), rtol=1e-5)
    with pytest.raises(TypeError, match=r"or let kd2m_jax.capture\(network, features=...\) read"):
        fit(net, (x, jnp.zeros(8, int)), batch_size=8)


def test_messages_name_what_to_write():
    x, y = jnp.ones((8, 6)), jnp.arange(8) % 3
    net = models.MLP((4,), 3, in_features=6, rngs=nnx.Rngs(0))
    for options, message in (
        ({"optimizer": "adam"}, "optimizer must be one of optax, optax.adam"),
        ({"teacher": x, "metric": "l2"}, r"an array: Outputs\(...\) of a teacher's for the same"),
    ):
        with pytest.raises(TypeError, match=message):
            fit(net, (x, y), batch_size=8, **options)
    with pytest.raises(TypeError, match=r"a bank takes arrays: Bank\(outputs.features"):
        kd2m_jax.Bank(net(x))
    with pytest.raises(TypeError, match=r"names by np\.unique"):
        fit(net, (x, np.array(["cat"] * 8)), batch_size=8)
    with pytest.raises(ValueError, match="got 7: the network has 3 logits"):
        fit(net, (x, y + 5), batch_size=8)
