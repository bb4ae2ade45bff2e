"""Teachers from anywhere: outputs computed before, several at once, and the student's own past."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

import kd2m_jax
from kd2m_jax import Network, Outputs, ema_teacher, ensemble, fit, from_linen, from_nnx, models

N, D, K = 48, 6, 3
X, _, Y = draw("clustered", N, D, classes=K)
X, Y = X.astype(np.float32), Y.astype(np.int32)


def mlp(seed=0, width=8):
    return models.MLP((width, 5), K, in_features=D, rngs=nnx.Rngs(seed))


def run(data=(X, Y), **options):
    options = {"epochs": 2, "batch_size": 16, "optimizer": optax.sgd(0.1)} | options
    return fit(mlp(1), data, **{"metric": "cw2", "coef": 0.1} | options)


# --- Outputs -----------------------------------------------------------------------------------


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.relu(x), nn.Dense(K)(x)


@pytest.mark.parametrize("batch_size", [7, 48, 1000])
def test_outputs_are_the_models(batch_size):
    expected = mlp()(X)
    got = kd2m_jax.outputs(mlp(), X, batch_size=batch_size)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    np.testing.assert_allclose(kd2m_jax.predict(mlp(), X), expected.logits, rtol=1e-5)
    module = Tiny()
    variables = module.init(jax.random.key(0), X)
    features, logits = module.apply(variables, X)
    got = kd2m_jax.outputs(module, X, variables=variables, batch_size=batch_size)
    chex.assert_trees_all_close(got, Outputs(features, logits), rtol=1e-5)


@pytest.mark.slow
def test_outputs_of_maps_and_of_inputs_that_are_a_tree():
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    net = models.resnet8(3, in_channels=1, rngs=nnx.Rngs(0))
    net.eval()
    got = kd2m_jax.outputs(net, images, batch_size=2)
    chex.assert_trees_all_close(got, net(images), rtol=1e-4, atol=1e-5)
    both = Network(lambda key, x: ({}, {}), lambda p, s, x, **_: (Outputs(x["a"], x["b"]), s))
    got = kd2m_jax.outputs(both, {"a": X, "b": X[:, :2]}, variables=({}, {}), batch_size=5)
    np.testing.assert_array_equal(got.features, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
        ({"x": np.zeros((0, D))}, "x has no examples"),
        ({"model": Tiny()}, "the trained variables are needed"),
    ],
)
def test_mistakes_of_outputs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        kd2m_jax.outputs(**{"model": mlp(), "x": X} | options)


def test_stored_outputs_are_as_good_as_the_network():
    seen = kd2m_jax.outputs(mlp(0), X)
    network = run(teacher=mlp(0)).history[-1]
    ways = {
        "argument": run(teacher=seen),
        "tuple": run((X, Y, seen)),
        "dict": run({"image": X, "label": Y, "teacher": seen._asdict()}),
    }
    for way in ways.values():
        last = way.history[-1]
        for name in network:
            np.testing.assert_allclose(last[name], network[name], rtol=1e-4)


@pytest.mark.slow
def test_streams_bring_the_teachers_outputs():
    seen = kd2m_jax.outputs(mlp(0), X)
    rows = [slice(i, i + 16) for i in range(0, N, 16)]
    pick = lambda s: {"features": seen.features[s], "logits": seen.logits[s]}  # noqa: E731
    stored = [{"image": X[s], "label": Y[s], "teacher": pick(s)} for s in rows]
    computed = run([(X[s], Y[s]) for s in rows], teacher=mlp(0)).history[-1]
    np.testing.assert_allclose(run(stored).history[-1]["loss"], computed["loss"], rtol=1e-4)
    del stored[1]["teacher"]
    with pytest.raises(ValueError, match="batch 2: some batches bring the teacher's outputs"):
        run(stored)


def test_stored_outputs_of_another_set_are_another_run(tmp_path):
    seen = kd2m_jax.outputs(mlp(0), X)
    run(teacher=seen, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="stored outputs and transfer set"):
        run(teacher=kd2m_jax.outputs(mlp(2), X), checkpoint_dir=tmp_path)


SEEN = mlp(0)(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": SEEN._replace(features=SEEN.features[:40])}, "must have a row for each"),
        ({"teacher": SEEN, "metric": None}, "and metric is missing"),
        ({"teacher": Outputs(SEEN.features), "metric": "kd"}, "needs the teacher's logits"),
        ({"data": [(X[:16], Y[:16])], "teacher": SEEN}, "an iterable's batches bring their own"),
        ({"data": (X, Y, SEEN), "teacher": mlp(0)}, "data brings the teacher's outputs, and there"),
        (
            {"data": (X, Y, {"logit": SEEN.logits})},
            "outputs are features, logits and maps, or some",
        ),
    ],
)
def test_mistakes_of_stored_outputs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(options.pop("data", (X, Y)), **options)
    with pytest.raises(TypeError, match="must be floating point"):
        run(teacher=Outputs(np.ones((N, 5), int)))


# --- Several -----------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_of_probabilities_and_all_features():
    nets = [mlp(0), mlp(2, 16)]
    outs = [net(X) for net in nets]
    for weights, shares in ((None, [0.5, 0.5]), ([3, 1], [0.75, 0.25])):
        both = ensemble(nets, weights=weights)
        got = kd2m_jax.outputs(both, X)
        p = sum(w * jax.nn.softmax(out.logits) for w, out in zip(shares, outs, strict=True))
        np.testing.assert_allclose(got.logits, jnp.log(p), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(
            got.features, np.concatenate([out.features for out in outs], axis=1)
        )


@pytest.mark.slow
def test_an_ensemble_teaches():
    both = ensemble([mlp(0), from_nnx(mlp(2))])
    result = run(teacher=both, metric="kd", coef=1.0, epochs=10)
    assert result.history[-1]["distillation_loss"] < result.history[0]["distillation_loss"]
    linen = Tiny()
    trained = from_linen(linen, linen.init(jax.random.key(0), X))
    result = run(teacher=ensemble([trained, mlp(0)]), metric="mmd-linear@logits", coef=1.0)
    assert np.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize(
    ("given", "weights", "message"),
    [
        ([], None, "takes models and a weight > 0 for each, got 0 models"),
        ([mlp()], [1, 2], "got 1 models and weights"),
        ([mlp(), mlp()], [1, 0], "a weight > 0 for each"),
        ([mlp(), mlp()], [1, np.inf], "a weight > 0 for each"),
        ([Tiny()], None, "brings no trained variables"),
    ],
)
def test_mistakes_of_ensembles_are_named(given, weights, message):
    with pytest.raises(ValueError, match=message):
        ensemble(given, weights=weights)


def test_an_ensemble_of_unequal_classes_is_named():
    other = models.MLP((8, 5), 4, in_features=D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"ensemble have \[3, 4\] classes"):
        kd2m_jax.outputs(ensemble([mlp(), other]), X)


# --- The student's own average -----------------------------------------------------------------


def test_the_average_is_the_exponential_one():
    seen = []
    options = {"teacher": ema_teacher(0.8), "metric": "l2", "log_every": 1, "epochs": 1}
    average = jax.tree.leaves(from_nnx(mlp(1)).variables[0])
    for steps in (1, 2, 3):
        state = run(max_steps=steps, **options).state
        params = jax.tree.leaves(state.params)
        average = [0.8 * a + 0.2 * p for a, p in zip(average, params, strict=True)]
        chex.assert_trees_all_close(jax.tree.leaves(state.average[0]), average, rtol=1e-5)
        seen.append(state)
    # It is the teacher: at first the student itself.
    history = run(**options).history
    assert history[0]["distillation_loss"] < 1e-9 < history[1]["distillation_loss"]
    # With a decay of 0 it is the student that the step finds.
    zero = run(**options | {"teacher": ema_teacher(0.0)}).history
    assert max(record["distillation_loss"] for record in zero) < 1e-9


@pytest.mark.slow
def test_a_killed_run_keeps_its_average(tmp_path):
    options = {"teacher": ema_teacher(0.9), "metric": "w2", "epochs": 4, "log_every": 1}
    whole = run(**options)
    run(**options | {"epochs": 2}, checkpoint_dir=tmp_path)
    again = run(**options, checkpoint_dir=tmp_path)
    chex.assert_trees_all_equal(whole.state.average, again.state.average)
    chex.assert_trees_all_equal(whole.state.params, again.state.params)
    with pytest.raises(ValueError, match="made with other settings"):
        run(**options | {"teacher": ema_teacher(0.5)}, checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_the_average_of_batch_statistics_and_of_a_population():
    images = np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype(np.float32)
    labels = np.arange(32) % 3
    student = models.resnet8(3, in_channels=1, rngs=nnx.Rngs(0))
    options = {"teacher": ema_teacher(0.5), "epochs": 2, "batch_size": 16}
    options |= {"optimizer": optax.sgd(0.1)}
    both = fit(student, (images, labels), metric=["l2", "w2"], coef=0.1, **options)
    for metric, result in zip(("l2", "w2"), both, strict=True):
        own = fit(student, (images, labels), metric=metric, coef=0.1, **options)
        chex.assert_trees_all_close(result.state.average, own.state.average, rtol=1e-4, atol=1e-5)
    means = jax.tree.leaves(both[0].state.average[1])
    assert any(np.abs(mean).max() > 0 for mean in means)


def test_the_average_moves_in_half_precision():
    def apply(params, state, x, *, train, rng):
        features = x @ params.astype(jnp.float32)
        return Outputs(features, features), state

    start = jnp.ones((D, K), jnp.bfloat16)
    student = Network(lambda key, x: (start, {}), apply)
    options = {"epochs": 10, "batch_size": 16, "optimizer": optax.sgd(0.05), "metric": "l2"}
    state = fit(student, (X, Y), teacher=ema_teacher(0.999), coef=0.1, **options).state
    average, _ = state.average
    assert state.params.dtype == jnp.bfloat16 and average.dtype == jnp.float32
    assert 0 < jnp.abs(average - 1).max() < jnp.abs(state.params - 1).max()


@pytest.mark.parametrize("decay", [1.0, -0.1, "0.9", float("nan")])
def test_a_wrong_decay_is_named(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        ema_teacher(decay)
