"""Which calls of fit() share a compiled program, and that a program holds nothing of a caller's."""

import functools
import gc
import itertools
import sys
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import Bank, Network, fit, from_nnx, losses, models
from kd2m_jax.training import _programs

N, D = 64, 10


def data(seed=0):
    x, _, labels = draw("clustered", N, D, classes=3, seed=seed)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed, width=6):
    return models.MLP((8, width), 3, in_features=D, rngs=nnx.Rngs(seed))


@pytest.fixture
def traces():
    """Make a preprocess that counts how often a training step is traced."""
    seen = []

    def preprocess(x, keys):
        if keys is not None:
            seen.append(x.shape)
        return x

    preprocess.seen = seen
    return preprocess


def run(preprocess, student=None, **options):
    options = {"epochs": 1, "batch_size": 16, "optimizer": optax.sgd(0.1)} | options
    return fit(student or mlp(1), data(), preprocess=preprocess, **options)


def test_calls_of_one_structure_share_a_program_and_end_as_they_would_alone(traces):
    first = run(traces, mlp(1), teacher=mlp(0, 6), metric="l2", coef=0.1)
    second = run(traces, mlp(2), teacher=mlp(3, 6), metric=losses.get_metric("l2"), coef=0.1)
    assert len(traces.seen) == 1
    alone = run(lambda x, keys: x, mlp(2), teacher=mlp(3, 6), metric="l2", coef=0.1)
    assert second.history == alone.history != first.history


@pytest.mark.parametrize(
    "other",
    [
        {"coef": 0.2},
        {"metric": "kd"},
        {"metric": "kd:temperature=3"},
        {"optimizer": optax.sgd(0.2)},
        {"optimizer": optax.adam(0.1)},
        {"student": mlp(1, 5), "metric": "mmd-rbf@logits"},
        {"task_coef": 0.5},
        {"devices": jax.devices()[:1]},
    ],
    ids="-".join,
)
def test_what_differs_is_compiled_anew(other, traces):
    usual = {"student": mlp(1), "teacher": mlp(0), "metric": "l2", "coef": 0.1}
    if str(other.get("metric")).startswith("kd:"):
        usual["metric"] = "kd"
    for options in (usual, usual | other):
        run(traces, **options)
    assert len(traces.seen) == 2


def test_what_a_function_refers_to_is_part_of_it():
    """Changed between two calls, it must not be taken for what it was."""
    scale = 1.0

    def preprocess(x, keys):
        return scale * x

    first = run(preprocess)
    scale = 2.0
    second = run(preprocess)
    assert second.history == run(lambda x, keys: 2.0 * x).history != first.history


class Scaled(nnx.Module):
    """It looks a number up each time it is traced."""

    scale = 1.0

    def __init__(self, seed):
        self.inner = mlp(seed)

    def __call__(self, x):
        return self.inner(factor * x)


factor = 1.0


def test_what_a_module_of_the_callers_refers_to_is_part_of_it(monkeypatch):
    first = run(None, Scaled(1))
    monkeypatch.setitem(globals(), "factor", 3.0)
    second = run(None, Scaled(1))
    assert second.history == run(lambda x, keys: 3.0 * x, mlp(1)).history != first.history


def count():
    gc.collect()
    return len(_programs._programs)


@pytest.mark.slow
def test_a_callers_function_is_held_weakly_and_takes_its_program_along():
    for key in list(_programs._programs):  # where there is no room each takes another's place
        _programs._forget(key)
    run(None)  # what does not depend on it stays
    before = count()

    def preprocess(x, keys):
        return 0.5 * x

    run(preprocess)
    assert count() > before
    gone = weakref.ref(preprocess)
    del preprocess
    assert count() == before and gone() is None


@pytest.mark.slow
@pytest.mark.parametrize("where", ["closure", "default", "partial", "network", "schedule"])
def test_a_program_that_holds_an_array_or_a_hidden_function_is_not_kept(where):
    mean = jnp.ones((1, D))
    wrapped = from_nnx(mlp(1))
    options = {
        "closure": {"preprocess": lambda x, keys: x - mean},
        "default": {"preprocess": lambda x, keys, mean=mean: x - mean},
        "partial": {"preprocess": functools.partial(lambda mean, x, keys: x - mean, mean)},
        "network": {
            "student": Network(
                wrapped.init, lambda p, s, x, **mode: wrapped.apply(p, s, x - mean, **mode)
            )
        },
        "schedule": {"optimizer": optax.sgd(lambda step: 0.1 / (1 + step))},
    }[where]
    options = {"preprocess": None, "eval_data": None} | options
    run(**options)  # what does not depend on it
    before = count()
    run(**options)
    assert count() == before


@pytest.mark.slow
def test_a_result_that_is_dropped_leaves_nothing_on_the_device():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            features = nn.Dense(300)(x)
            return features, nn.Dense(3)(features)

    def mebibytes():
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays()) / 2**20

    options = {"teacher": models.MLP((300, 300), 3, in_features=D, rngs=nnx.Rngs(0))}
    options |= {"metric": "l2", "eval_data": data(1)}
    left = []
    for _ in range(3):
        run(None, Net(), **options)
        run(None, models.MLP((300, 300), 3, in_features=D, rngs=nnx.Rngs(1)), **options)
        left.append(mebibytes())
    assert left[2] - left[0] < 0.01


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(_programs, "MOST", 2)
    for width in (3, 4, 5):
        run(None, mlp(1, width))
    assert len(_programs._programs) == 2


def maps():
    """Return how many pieces of memory the process maps: Linux grants 65,530."""
    gc.collect()
    with open("/proc/self/maps") as file:
        return len(file.readlines())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc/self/maps")
@pytest.mark.parametrize("shared", [True, False])
def test_programs_that_are_not_kept_give_their_memory_back(shared, monkeypatch):
    """140 fits of cw2 used to reach the limit, which ends the process."""
    monkeypatch.setattr(_programs, "MOST", 2)
    mean = jnp.zeros((1, D))
    preprocess = None if shared else lambda x, keys: x - mean  # holds an array: for one call alone
    counts = []
    for i in range(5):
        # A program of one device has as many pieces, and is compiled sooner.
        options = {"teacher": mlp(0, 3 + i), "metric": "cw2", "devices": jax.devices()[:1]}
        run(preprocess, mlp(1, 3 + i), **options)
        counts.append(maps())
    grown = [later - before for before, later in itertools.pairwise(counts)]
    # A step is in 140 pieces; 25 are of small programs that JAX keeps by the shapes of arrays.
    assert max(grown[2:]) < 90, grown


def test_one_trace_of_the_step_and_one_of_evaluation():
    """97 examples leave one over an epoch, and the 1,003 of evaluation fill two batches and 3."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(1003, 4)).astype(np.float32), np.arange(1003) % 3
    traces, compiled, at_ends = [], [], []

    def counted(name, seed):
        inner = from_nnx(models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(seed)))

        def apply(params, state, x, *, train, rng=None):
            traces.append((name, train))
            return inner.apply(params, state, x, train=train, rng=rng)

        return Network(inner.init, apply)

    def note(event, duration_secs, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    teacher = counted("teacher", 0)
    jax.monitoring.register_event_duration_secs_listener(note)
    fit(
        counted("student", 1),
        (x[:97], labels[:97]),
        teacher=teacher,
        teacher_variables=teacher.init(None, x),
        metric="cw2",
        epochs=3,
        batch_size=16,
        eval_data=(x, labels),
        optimizer=optax.sgd(0.1),
        callbacks=[lambda record: at_ends.append(len(compiled))],
    )
    # How many classes the student knows, and whether one of them convolves.
    shapes = [("student", False), ("teacher", False)]
    step, evaluation = [("student", True), ("teacher", False)], [("student", False)]
    assert sorted(traces) == sorted([*shapes, *step, *evaluation])
    assert len(at_ends) == 3 and at_ends[0] > 0
    assert at_ends[1] == at_ends[2]  # the second epoch still copies the best parameters once


# At the top of a module and without arrays: what can be shared, and is held weakly.
def three(student, teacher, labels):
    return losses.cw2(student.features, teacher.features, labels)


def with_a_key(student, teacher, labels, *, key):
    noise = 0 * jax.random.normal(key, ())
    return losses.cw2(student.features, teacher.features, labels) + noise


def with_their_labels(student, teacher, labels, *, labels_t=None):
    apart = {} if labels_t is None else {"labels_t": labels_t}
    return losses.cw2(student.features, teacher.features, labels, **apart)


@pytest.mark.slow
@pytest.mark.parametrize("metric", [three, with_a_key, with_their_labels])
def test_a_metric_that_is_held_weakly_gets_what_it_names(metric):
    """Its signature is that of the function, and not of what stands for it in the program."""
    options = {"epochs": 1, "batch_size": 16, "coef": 0.1, "optimizer": optax.sgd(0.1)}
    found = fit(mlp(1), data(), teacher=mlp(0), metric=metric, **options)
    same = fit(mlp(1), data(), teacher=mlp(0), metric="cw2", **options)
    expected = same.history[-1]["distillation_loss"]
    assert found.history[-1]["distillation_loss"] == pytest.approx(expected, rel=1e-5)
    if metric is with_their_labels:  # which fit gives where the teacher's rows are others
        x, labels = data()
        bank = Bank(mlp(0)(x).features, labels=labels)
        found = fit(mlp(1), data(), teacher=bank, metric=metric, **options)
        same = fit(mlp(1), data(), teacher=bank, metric="cw2", **options)
        expected = same.history[-1]["distillation_loss"]
        assert found.history[-1]["distillation_loss"] == pytest.approx(expected, rel=1e-5)
