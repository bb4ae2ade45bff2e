"""The step on one device and on four, with Flax NNX and Linen networks."""

import functools

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
from kd2m_jax import Outputs, from_linen, from_nnx, init_state, losses
from kd2m_jax.internal import step_body

N, D, CLASSES = 32, 12, 3


class NnxNet(nnx.Module):
    """Batch statistics and dropout, the two kinds of state that a step must carry."""

    def __init__(self, width=16, dropout=0.0, *, rngs):
        self.inner = nnx.Linear(D, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.outer = nnx.Linear(width, 10, rngs=rngs)
        self.head = nnx.Linear(10, CLASSES, rngs=rngs)

    def __call__(self, x):
        features = self.outer(self.dropout(nnx.relu(self.norm(self.inner(x)))))
        return Outputs(features, self.head(nnx.relu(features)))


class LinenNet(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(16)(x))
        features = nn.Dense(10)(nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x)))
        return features, nn.Dense(CLASSES)(nn.relu(features))


def student(kind, dropout=0.0):
    if kind == "nnx":
        return from_nnx(NnxNet(dropout=dropout, rngs=nnx.Rngs(1)))
    return from_linen(LinenNet(dropout))


@functools.cache
def setting():
    x, _, labels = draw("clustered", N, D, classes=CLASSES)
    teacher = from_nnx(NnxNet(width=32, rngs=nnx.Rngs(0)))
    x = jnp.asarray(x, jnp.float32)
    return (x, jnp.asarray(labels)), teacher, teacher.init(None, x)


def train(make_step, kind, metric, *, steps=3, dropout=0.0, coef=0.1, **options):
    batch, teacher, variables = setting()
    network, optimizer = student(kind, dropout), optax.sgd(0.05, momentum=0.9)
    step = make_step(network, teacher, optimizer, metric=metric, coef=coef, **options)
    state = init_state(network, optimizer, batch[0], key=jax.random.key(3))
    history = []
    for _ in range(steps):
        state, metrics = step(state, variables, batch)
        history.append(metrics)
    return state, history


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_step_lowers_the_loss_and_moves_the_batch_statistics(kind):
    batch, _, variables = setting()
    before = jax.tree.map(np.array, variables)
    state, history = train(kd2m_jax.make_train_step, kind, "cw2", steps=20)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["distillation_loss"] < history[0]["distillation_loss"]
    first = history[0]
    expected = first["task_loss"] + first["coef"] * first["distillation_loss"]
    np.testing.assert_allclose(first["loss"], expected, rtol=1e-6)
    fresh = student(kind).init(jax.random.key(0), batch[0])[1]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), fresh, state.model_state)
    assert jax.tree.leaves(moved) and min(jax.tree.leaves(moved)) > 1e-3
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, variables))  # to the bit


def test_the_step_is_algorithm_1():
    """One step against the same written out by hand, without our step or our Network."""
    (x, labels), _, _ = setting()
    teacher, module = NnxNet(width=32, rngs=nnx.Rngs(0)), NnxNet(rngs=nnx.Rngs(1))
    state, _ = train(kd2m_jax.make_train_step, "nnx", "gaussian-w2", steps=1)
    teacher.eval()
    module.train()
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    seen = teacher(x).features

    def loss(params):
        out = nnx.merge(graph, params, rest, copy=True)(x)
        task = optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean()
        return task + 0.1 * losses.gaussian_w2(out.features, seen)

    expected = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))
    chex.assert_trees_all_close(
        nnx.to_pure_dict(state.params), nnx.to_pure_dict(expected), rtol=1e-4, atol=1e-6
    )


@functools.cache
def on_one_device(kind, metric):
    return train(kd2m_jax.make_train_step, kind, metric)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "metric",
    [
        "cw2",
        pytest.param("cw2:solver=sinkhorn", marks=slow),
        pytest.param("gaussian-kl", marks=slow),
    ],
)
@pytest.mark.parametrize(
    ("wrapper", "kind"),
    [("pmap", "nnx"), ("shard_map", "linen"),
     pytest.param("pmap", "linen", marks=slow), pytest.param("shard_map", "nnx", marks=slow)],
)  # fmt: skip
def test_four_devices_give_the_parameters_of_one(wrapper, kind, metric):
    assert jax.device_count() == 4
    _, _, variables = setting()
    before = jax.tree.map(np.array, variables)
    make_step = {"pmap": kd2m_jax.pmap_step, "shard_map": kd2m_jax.shard_map_step}[wrapper]
    several, logs = train(make_step, kind, metric)
    one, expected = on_one_device(kind, metric)
    host = functools.partial(jax.tree.map, np.asarray)
    # atol: a parameter that is nearly zero has no relative precision to speak of.
    chex.assert_trees_all_close(host(several.variables), host(one.variables), rtol=1e-4, atol=2e-6)
    chex.assert_trees_all_close(host(logs), host(expected), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, variables))


@pytest.mark.slow
def test_pmap_on_a_subset_of_the_devices_and_a_batch_that_does_not_split():
    one, _ = train(kd2m_jax.make_train_step, "nnx", "cw2", steps=1)
    two, _ = train(
        functools.partial(kd2m_jax.pmap_step, devices=jax.devices()[:2]), "nnx", "cw2", steps=1
    )
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, two.params), jax.tree.map(np.asarray, one.params), rtol=1e-4,
        atol=2e-6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="32 does not split evenly over 3 devices"):
        train(functools.partial(kd2m_jax.pmap_step, devices=jax.devices()[:3]), "nnx", "cw2")


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_dropout_draws_anew_each_step_and_repeats_with_the_key(kind):
    def frozen(*args, **kwargs):  # a learning rate of 0: only the draws can differ
        return kd2m_jax.make_train_step(args[0], args[1], optax.sgd(0.0), **kwargs)

    batch, teacher, variables = setting()
    network = student(kind, dropout=0.5)
    step = frozen(network, teacher, metric="l2", coef=1.0)

    def run():
        state = init_state(network, optax.sgd(0.0), batch[0], key=jax.random.key(0))
        values = []
        for _ in range(3):
            state, metrics = step(state, variables, batch)
            values.append(float(metrics["distillation_loss"]))
        return values

    first = run()
    assert len(set(first)) == 3
    assert first == run()


def test_donation_leaves_the_wrapped_module_alive():
    module = NnxNet(rngs=nnx.Rngs(1))
    batch, teacher, variables = setting()
    optimizer = optax.sgd(0.1)
    network = from_nnx(module)
    step = kd2m_jax.make_train_step(network, teacher, optimizer, metric="l2")
    step(init_state(network, optimizer, batch[0], key=jax.random.key(0)), variables, batch)
    assert jnp.isfinite(module(batch[0]).logits).all()


def test_coef_may_be_a_schedule():
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    _, history = train(kd2m_jax.make_train_step, "nnx", "l2", coef=schedule)
    assert [float(m["coef"]) for m in history] == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(history[0]["loss"], history[0]["task_loss"])
    total = history[2]["task_loss"] + history[2]["distillation_loss"]
    np.testing.assert_allclose(history[2]["loss"], total, rtol=1e-6)


def test_without_a_teacher_a_step_is_plain_cross_entropy():
    batch, _, _ = setting()
    network, optimizer = student("nnx"), optax.sgd(0.1)
    step = kd2m_jax.make_train_step(network, None, optimizer, metric=None)
    state = init_state(network, optimizer, batch[0], key=jax.random.key(0))
    state, metrics = step(state, None, batch)
    assert metrics["distillation_loss"] == 0
    assert metrics["loss"] == metrics["task_loss"]


@pytest.mark.slow
def test_students_can_be_vmapped():
    """Three students in one program, as a sweep over seeds would have it."""
    batch, teacher, variables = setting()
    network, optimizer = from_linen(LinenNet()), optax.sgd(0.1)
    step = kd2m_jax.make_train_step(network, teacher, optimizer, metric="cw2", coef=0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    init = functools.partial(init_state, network, optimizer, batch[0])
    states = jax.vmap(lambda key: init(key=key))(keys)
    _, metrics = jax.vmap(step, in_axes=(0, None, None))(states, variables, batch)
    for i in range(3):
        _, alone = step(init(key=keys[i]), variables, batch)
        np.testing.assert_allclose(metrics["loss"][i], alone["loss"], rtol=1e-4)


def test_a_step_is_traced_once():
    batch, teacher, variables = setting()
    network, optimizer = student("nnx"), optax.sgd(0.1)
    options = {"metric": "cw2", "coef": 1.0, "task_coef": 1.0, "axis": None}
    body = step_body(network, teacher, optimizer, **options)
    state = init_state(network, optimizer, batch[0], key=jax.random.key(0))
    counted = jax.jit(chex.assert_max_traces(lambda *arguments: body(*arguments), 1))
    for _ in range(3):
        state, _ = counted(state, variables, batch)


def test_evaluation_counts_all_examples_and_no_padding():
    (x, labels), teacher, variables = setting()
    eval_step = kd2m_jax.make_eval_step(teacher)
    whole = eval_step(variables, (x, labels))
    padded = eval_step(variables, (x, labels.at[20:].set(-1)))
    assert (whole["count"], padded["count"]) == (32, 20)
    out, _ = teacher.apply(*variables, x, train=False, rng=None)
    right = np.asarray(out.logits).argmax(1) == np.asarray(labels)
    assert (whole["correct"], padded["correct"]) == (right.sum(), right[:20].sum())


def test_mistakes_are_named():
    batch, teacher, _ = setting()
    make = functools.partial(kd2m_jax.make_train_step, student("nnx"), teacher, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"unknown metric 'gausian-w2': did you mean gaussian-w2"):
        make(metric="gausian-w2")
    with pytest.raises(ValueError, match="coef must be >= 0, got -1"):
        make(metric="w2", coef=-1)
    with pytest.raises(ValueError, match="compares with a teacher, and there is none"):
        step = kd2m_jax.make_train_step(student("nnx"), None, optax.sgd(0.1), metric="w2")
        state = init_state(student("nnx"), optax.sgd(0.1), batch[0], key=jax.random.key(0))
        step(state, None, batch)
    with pytest.raises(TypeError, match=r"flax\.nnx\.Module instance"):
        from_nnx(LinenNet())
    with pytest.raises(TypeError, match=r"flax\.linen\.Module instance"):
        from_linen(NnxNet(rngs=nnx.Rngs(0)))

    class OnlyLogits(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    network = from_linen(OnlyLogits())
    with pytest.raises(TypeError, match=r"OnlyLogits must return kd2m_jax\.Outputs"):
        network.apply(*network.init(jax.random.key(0), batch[0]), batch[0], train=False)


class OfCopies(nnx.Module):
    """Layers made by vmap, with a dropout each: their random streams have several keys."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def layers(rngs):
            return nnx.Dropout(0.5, rngs=rngs)

        self.drop, self.head = layers(rngs), nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, x):
        dropped = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.drop, x)
        features = dropped.mean(0)
        return features, self.head(features)


class Counting(nnx.Module):
    """State that a call sets to a plain number."""

    def __init__(self, rngs):
        self.head, self.seen = nnx.Linear(D, CLASSES, rngs=rngs), nnx.Variable(jnp.zeros((), int))

    def __call__(self, x):
        self.seen.set_value(x.shape[0]) if hasattr(self.seen, "set_value") else None
        return x, self.head(x)


@pytest.mark.parametrize("network", [OfCopies, Counting])
def test_networks_of_other_kinds_step_twice(network):
    (x, labels), _, _ = setting()
    network, optimizer = from_nnx(network(nnx.Rngs(0))), optax.sgd(0.1)
    step = kd2m_jax.make_train_step(network, None, optimizer, metric=None)
    state = init_state(network, optimizer, x, key=jax.random.key(0))
    for _ in range(2):
        state, metrics = step(state, None, (x, labels))
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    "make", [kd2m_jax.make_train_step, kd2m_jax.pmap_step, kd2m_jax.shard_map_step]
)
def test_labels_that_jax_would_cut_are_refused_in_ones_own_loop(make):
    (x, labels), _, _ = setting()
    network, optimizer = from_nnx(NnxNet(rngs=nnx.Rngs(0))), optax.sgd(0.1)
    state = init_state(network, optimizer, x, key=jax.random.key(0))
    ids = np.asarray(labels, np.int64) + 2**32
    with pytest.raises(ValueError, match="do not fit into 32 bits"):
        make(network, None, optimizer, metric=None)(state, None, (x, ids))
    with pytest.raises(ValueError, match="do not fit into 32 bits"):
        kd2m_jax.make_eval_step(network)(network.init(None, x), (x, ids))


def test_a_teacher_on_the_students_own_memory():
    """Another object and the same buffer: donated and read in one call."""
    (x, labels), _, _ = setting()
    network, optimizer = from_nnx(NnxNet(rngs=nnx.Rngs(0))), optax.sgd(0.1)
    step = kd2m_jax.make_train_step(network, network, optimizer, metric="l2", coef=0.1)
    state = init_state(network, optimizer, x, key=jax.random.key(0))
    alias = jax.tree.map(lambda a: jax.device_put(a, a.sharding), state.variables)
    _, metrics = step(state, alias, (x, labels))
    assert np.isfinite(metrics["loss"])
