"""coef="auto": lambda from the norms of the two terms' gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

import kd2m_jax
from kd2m_jax import fit, from_nnx, init_state, losses, models

N, D, CLASSES, METRIC = 32, 12, 3, "gaussian-w2"


def mlp(width, seed):
    return models.MLP((width, 8), CLASSES, in_features=D, rngs=nnx.Rngs(seed))


@functools.cache
def setting():
    x, _, labels = draw("clustered", 3 * N, D, classes=CLASSES)
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels), from_nnx(mlp(32, 0))


def batch(i):
    x, labels, _ = setting()
    return x[i % 3 * N :][:N], labels[i % 3 * N :][:N]


def train(make_step=kd2m_jax.make_train_step, steps=5, lr=0.05, **options):
    """Return the states before each step and the metrics of each."""
    student, teacher = from_nnx(mlp(16, 1)), setting()[2]
    options = {"metric": METRIC, "coef": "auto:0.3"} | options
    step = make_step(student, teacher, optax.sgd(lr), **options)
    state = init_state(student, optax.sgd(lr), batch(0)[0], key=jax.random.key(0))
    states, history = [], []
    for i in range(steps):
        states.append(jax.tree.map(np.asarray, state._replace(key=None)))
        state, metrics = step(state, teacher.init(None, None), batch(i))
        history.append({k: float(v) for k, v in metrics.items()})
    return [*states, jax.tree.map(np.asarray, state._replace(key=None))], history


def gradients(state, i):
    """Those of the two terms at a state, written out without our step."""
    (x, labels), teacher, student = batch(i), mlp(32, 0), mlp(16, 1)
    graph, _, rest = nnx.split(student, nnx.Param, ...)
    seen = teacher(x).features

    def out(params):
        return nnx.merge(graph, params, rest, copy=True)(x)

    def task(params):
        logits = out(params).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = jax.tree.map(jnp.asarray, state.params)
    distance = jax.grad(lambda p: losses.gaussian_w2(out(p).features, seen))(params)
    return jax.grad(task)(params), distance


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))


def test_lambda_is_the_ratio_of_exponential_means():
    states, history = train()
    means = np.zeros(2)
    for i, metrics in enumerate(history):
        new = np.array([norm(g) for g in gradients(states[i], i)])
        means = 0.8 * means + 0.2 * new
        assert metrics["coef"] == pytest.approx(0.3 * means[0] / means[1], rel=1e-4)
        total = metrics["task_loss"] + metrics["coef"] * metrics["distillation_loss"]
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
        np.testing.assert_allclose(states[i + 1].grad_norms, means, rtol=1e-4)
    assert len({m["coef"] for m in history}) == len(history)


def test_the_update_is_that_of_the_weighted_sum():
    states, history = train(steps=1)
    of_task, of_distance = gradients(states[0], 0)
    lam = history[0]["coef"]
    expected = jax.tree.map(
        lambda p, t, d: p - 0.05 * (t + lam * d), states[0].params, of_task, of_distance
    )
    chex.assert_trees_all_close(states[1].params, expected, rtol=1e-4, atol=1e-6)


def test_the_gradients_keep_the_ratio_through_training():
    states, history = train(steps=40, lr=0.01)
    ratios = []
    for i in range(20, 40):
        of_task, of_distance = map(norm, gradients(states[i], i))
        ratios.append(history[i]["coef"] * of_distance / of_task)
    assert np.mean(ratios) == pytest.approx(0.3, rel=0.1)


def test_the_weight_of_the_labels_is_part_of_the_task():
    assert train(steps=1, task_coef=0.5)[1][0]["coef"] == pytest.approx(
        0.5 * train(steps=1)[1][0]["coef"], rel=1e-5
    )


@pytest.mark.parametrize("wrapper", ["pmap_step", "shard_map_step"])
def test_four_devices_give_the_result_of_one(wrapper):
    assert jax.device_count() == 4
    one, expected = train()
    several, history = train(getattr(kd2m_jax, wrapper))
    chex.assert_trees_all_close(several[-1], one[-1], rtol=1e-4, atol=2e-6)
    chex.assert_trees_all_close(history, expected, rtol=1e-4, atol=1e-6)


def test_no_distance_no_weight():
    """Student and teacher are the same network, so the distance has no gradient at all."""
    network = from_nnx(mlp(16, 1))
    step = kd2m_jax.make_train_step(network, network, optax.sgd(0.1), metric="l2", coef="auto")
    state = init_state(network, optax.sgd(0.1), batch(0)[0], key=jax.random.key(0))
    state, metrics = step(state, network.init(None, None), batch(0))
    assert metrics["coef"] == 0 and metrics["loss"] == metrics["task_loss"]
    assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(state.params))


def test_a_sum_of_metrics_is_weighted_as_one():
    total = losses.metric_sum([losses.get_metric(m) for m in ("l2", METRIC)], [0.5, 2.0])
    metrics = train(steps=1, metric=total)[1][0]
    sum_ = 0.5 * metrics["distillation_loss/l2"] + 2 * metrics[f"distillation_loss/{METRIC}"]
    assert metrics["distillation_loss"] == pytest.approx(sum_, rel=1e-5)
    assert metrics["coef"] > 0


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    x, labels, _ = setting()
    options = {"teacher": mlp(32, 0), "metric": METRIC, "coef": "auto", "batch_size": N}
    options |= {"epochs": 3, "optimizer": optax.sgd(0.05), "log_every": 1}
    whole = fit(mlp(16, 1), (x, labels), **options)
    fit(mlp(16, 1), (x, labels), **options, checkpoint_dir=tmp_path, max_steps=4)
    resumed = fit(mlp(16, 1), (x, labels), **options, checkpoint_dir=tmp_path)
    assert len(resumed.history) == 9
    chex.assert_trees_all_equal(
        *(jax.tree.map(np.asarray, r.state._replace(key=None)) for r in (whole, resumed))
    )
    assert whole.state.grad_norms.min() > 0
    coefs = [[r["coef"] for r in result.history] for result in (whole, resumed)]
    assert coefs[0] == coefs[1]


@pytest.mark.parametrize("coef", ["auto:x", "auto:-1", "auto:0", "auto:nan", "automatic", "1e-3"])
def test_a_mistake_is_named(coef):
    with pytest.raises(ValueError, match="or 'auto:RATIO' with RATIO > 0, got"):
        train(coef=coef)


def test_there_must_be_a_task_to_follow():
    with pytest.raises(ValueError, match="task_coef is 0"):
        train(task_coef=0.0)
