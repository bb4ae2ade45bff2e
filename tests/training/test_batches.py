"""What fit() makes of other people's data: loaders, lists, and how often it compiles."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import fit, from_nnx, init_state, make_train_step, models, training
from kd2m_jax.training._batches import Batches, steps_per_call

N, D = 96, 10


def data(seed=0):
    x, _, labels = draw("clustered", N, D, classes=3, seed=seed)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed):
    return models.MLP((8, 6), 3, in_features=D, rngs=nnx.Rngs(seed))


class Rows:
    """A random-access source for grain."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, labels = data()
        return x[i], labels[i]


def by_hand(batches, epochs):
    """Run the same training as a loop over the one-device step."""
    network, optimizer = from_nnx(mlp(1)), optax.sgd(0.1)
    step = make_train_step(network, network, optimizer, metric="cw2", coef=0.01)
    teacher = from_nnx(mlp(0)).init(None, None)
    state = init_state(network, optimizer, jnp.ones((1, D)), key=jax.random.key(0))
    for _ in range(epochs):
        for batch in batches:
            state, _ = step(state, teacher, tuple(jnp.asarray(a) for a in batch))
    return state.params


def fitted(batches, epochs):
    options = {"teacher": mlp(0), "metric": "cw2", "coef": 0.01, "optimizer": optax.sgd(0.1)}
    return fit(mlp(1), batches, epochs=epochs, **options)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_list_of_batches_is_taken_in_its_order():
    x, labels = data()
    batches = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, N, 16)]
    result = fitted(batches, 2)
    assert result.history[-1]["step"] == 12 and result.history[-1]["steps"] == 12
    assert_close(result.state.params, by_hand(batches, 2))


def test_a_grain_loader():
    grain = pytest.importorskip("grain.python")

    dataset = grain.MapDataset.source(Rows()).shuffle(seed=0).to_iter_dataset().batch(16)
    result = fitted(dataset, 2)
    assert result.history[-1]["step"] == 12
    assert_close(result.state.params, by_hand(list(dataset), 2))


def test_one_program_for_training_and_one_for_evaluation():
    """Neither a last partial batch of the test set nor a second epoch compiles anything."""
    traced = []

    def preprocess(x, keys):
        traced.append(keys is not None)
        return x

    x, labels = data(1)
    x, labels = np.tile(x, (6, 1))[:520], np.tile(labels, 6)[:520]  # 500 and 20
    fit(mlp(1), data(), epochs=3, batch_size=16, eval_data=(x, labels), preprocess=preprocess)
    training, evaluation = traced.count(True), traced.count(False)
    assert (training, evaluation) == (1, 2)  # the second without keys asks for the input's shape


@pytest.mark.slow
def test_the_student_that_comes_back_normalises_with_its_running_statistics():
    images = np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype(np.float32)
    labels = np.arange(32) % 3
    student = models.resnet8(3, in_channels=1, rngs=nnx.Rngs(0))
    trained = fit(student, (images, labels), epochs=1, batch_size=16).student
    together, alone = trained(images).logits[:1], trained(images[:1]).logits
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (list(data()), r"data is a list of two arrays: pass them as a tuple \(x, labels\)"),
        ([np.ones((4, D))], r"batch 1 must be \(x, labels\) or a dict .*, got one array"),
        ([(np.ones(4), 0)], r"batch 1: labels must be \[n\], got \[\]"),
        ([{"img": np.ones((4, D))}], "batch 1 is a dict of img: it needs one key of image/x"),
    ],
)
def test_data_that_is_no_batch_is_named(batches, message):
    with pytest.raises(ValueError, match=message):
        fit(mlp(1), batches, epochs=1)
    with pytest.raises(ValueError, match="data gave no batch"):
        fit(mlp(1), [], epochs=1)


class Endless:
    """A loader that never stops, and so has no length."""

    def __iter__(self):
        x, labels = data()
        return itertools.cycle([(x[:16], labels[:16]), (x[16:32], labels[16:32])])


def test_an_endless_loader_ends_with_max_steps_and_its_learning_rate_too():
    history = fit(mlp(1), Endless(), max_steps=5, log_every=1, eval_data=data(1)).history
    assert [(r["step"], r["epoch"], r["steps"]) for r in history] == [
        (k, 1, 5) for k in range(1, 6)
    ]
    assert "test_accuracy" in history[-1]


def test_a_first_batch_that_does_not_split_is_named_before_anything_is_compiled():
    x, labels = data()

    def preprocess(x, keys):
        raise AssertionError("traced")

    for given in ([(x[:10], labels[:10])], (x, labels)):
        with pytest.raises(ValueError, match="a batch of 10 does not split evenly over 4 devices"):
            fit(mlp(1), given, batch_size=10, preprocess=preprocess)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, 1), (7, 7), (390, 15), (937, 20), (20, 20), (23, 20), (781, 11)]
)
def test_an_accelerator_makes_many_steps_a_call_and_a_shorter_last_one(steps, expected):
    batches = Batches((np.zeros((steps * 4, 1)), np.zeros(steps * 4, int)), 4, seed=0, devices=1)
    on = {name: types.SimpleNamespace(platform=name) for name in ("cpu", "gpu", "tpu")}
    for name in ("gpu", "tpu"):
        assert steps_per_call(on[name], batches, log_every=50, alone=lambda: True) == expected
    calls = [len(rows) for (rows, _), _ in batches.epoch(0, expected)]
    assert sum(calls) == steps and set(calls[:-1]) <= {expected} and calls[-1] <= expected
    x, labels = data()
    listed = Batches([(x[:16], labels[:16])] * 12, 16, seed=0, devices=1)
    assert steps_per_call(on["gpu"], listed, log_every=50, alone=lambda: False) == 1


@pytest.mark.parametrize(("log_every", "expected"), [(50, 10), (12, 12), (1, 1), (7, 7), (40, 12)])
def test_a_cpu_makes_a_divisor_of_log_every_and_one_where_networks_convolve(log_every, expected):
    batches = Batches((np.zeros((48, 1)), np.zeros(48, int)), 4, seed=0, devices=1)  # 12 steps
    cpu = types.SimpleNamespace(platform="cpu")
    assert steps_per_call(cpu, batches, log_every, alone=lambda: False) == expected
    assert steps_per_call(cpu, batches, log_every, alone=lambda: True) == 1


def test_several_steps_a_call_end_as_single_ones(monkeypatch):
    """The same bits and records; four calls an epoch, the last of them shorter."""
    options = {"epochs": 2, "batch_size": 8, "log_every": 3, "eval_data": data(1)}
    x, labels = data()
    made = []

    def run():
        counted = lambda *given: made.append(steps_per_call(*given)) or made[-1]  # noqa: E731
        monkeypatch.setattr(training._plan, "steps_per_call", counted)
        return fit(mlp(1), (x[:80], labels[:80]), teacher=mlp(2), metric="cw2", **options)

    several = run()
    monkeypatch.setattr(training._plan, "_alone", lambda *given: True)
    single = run()
    assert made == [3, 1] and several.history == single.history
    jax.tree.map(np.testing.assert_array_equal, several.state.variables, single.state.variables)


def test_a_call_is_under_way_while_the_one_before_is_recorded(monkeypatch):
    """Or the device would wait for the callbacks of each call that has log_every steps."""
    events, mapped = [], training._plan._mapped

    def watched(*arguments):
        step = mapped(*arguments)

        def call(states, teacher_variables, rows, arrays):
            events.append(f"call of {len(rows[0])}")
            return step(states, teacher_variables, rows, arrays)

        return call

    monkeypatch.setattr(training._plan, "_mapped", watched)
    monkeypatch.setattr(training._plan, "steps_per_call", lambda *given: 4)
    told = [lambda record: events.append(f"record {record['step']}")]
    x, labels = data()
    fit(mlp(1), (x[:80], labels[:80]), epochs=1, batch_size=8, log_every=4, callbacks=told)
    assert events == ["call of 4", "call of 4", "record 4", "call of 2", "record 8", "record 10"]
