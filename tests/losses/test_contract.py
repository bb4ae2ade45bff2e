"""What every metric of the catalogue has in common: one walk for signature, jit, grad and vmap."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import compiled
from walk import batch, speed, used

from kd2m_jax import losses

metrics = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=speed(name)) for name in losses.METRICS]
)
KEY = jax.random.key(0)
ARRAYS = ["z_s", "z_t", "maps_s", "maps_t", "logits_s", "logits_t", "labels"]


def arguments(function, student, teacher, labels):
    """Pick a loss's own arguments by name: what `Metric` should hand it."""
    known = {
        "z_s": student.features,
        "z_t": teacher.features,
        "logits_s": student.logits,
        "logits_t": teacher.logits,
        "maps_s": student.maps,
        "maps_t": teacher.maps,
        "labels": labels,
        "key": KEY,
    }
    return {p: known[p] for p in inspect.signature(function).parameters if p in known}


@metrics
def test_signature(name):
    function = losses.METRICS[name].function
    assert getattr(losses, function.__name__) is function
    assert inspect.isfunction(function)
    parameters = inspect.signature(function).parameters.values()
    arrays = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert len(arrays) + len(options) == len(parameters)
    assert all(p.default is p.empty for p in parameters if p.name in arrays)
    assert all(p.default is not p.empty for p in options if p.name != "key")
    # The student comes first and the teacher second, whatever is compared; labels come last.
    assert [a for a in arrays if a not in ARRAYS] == []
    students = [a for a in arrays if a.endswith("_s")]
    for student in students:
        assert arrays.index(student.removesuffix("_s") + "_t") == arrays.index(student) + 1
    assert arrays.index(students[0]) == 0
    assert "labels" not in arrays or arrays[-1] == "labels"


@metrics
def test_catalogue_entry(name):
    info = losses.METRICS[name]
    assert info.description and info.formula and info.source
    stem = info.function.__name__.replace("_", "-")
    assert name == stem or info.options  # a preset has a name of its own
    assert set(info.needs) <= {"labels", "logits", "maps", "key"}
    metric = losses.get_metric(name)
    assert metric == losses.get_metric(name.replace("-", "_"))
    assert hash(metric) == hash(losses.get_metric(name.upper()))
    if "features" in used(metric):
        on_logits = losses.get_metric(f"{name}@logits")
        assert on_logits == losses.get_metric(name, on="logits") != metric
        assert "logits" in on_logits.needs


def test_options_and_presets():
    metric = losses.get_metric("jw2", beta=0.5, label_cost="kl")
    assert metric == losses.get_metric("JW2", label_cost="kl", beta=0.5)
    assert metric != losses.get_metric("jw2", beta=0.6, label_cost="kl")
    *networks, labels = batch()
    direct = losses.jw2(**arguments(losses.jw2, *networks, labels), beta=0.5, label_cost="kl")
    assert metric(*networks) == direct


@metrics
def test_on_the_logits(name):
    info, (student, teacher, labels) = losses.METRICS[name], batch()
    if "features" not in used(losses.get_metric(name)):
        pytest.skip("takes no features")
    student, teacher = (o._replace(features=None) for o in (student, teacher))
    given = arguments(info.function, student, teacher, labels)
    given |= {"z_s": student.logits, "z_t": teacher.logits}
    value = losses.get_metric(f"{name}@logits")(student, teacher, labels, key=KEY)
    assert value == info.function(**given, **info.options)


@metrics
def test_jit_is_eager_and_the_metric_is_the_function(name):
    metric, info, (student, teacher, labels) = (
        losses.get_metric(name),
        losses.METRICS[name],
        batch(),
    )
    given = arguments(info.function, student, teacher, labels)
    direct = info.function(**given, **info.options)
    chex.assert_shape(direct, ())
    chex.assert_type(direct, jnp.float32)
    assert metric(tuple(student), tuple(teacher), labels, key=KEY) == direct  # or plain tuples
    # Compiled inside a larger program, sums may be regrouped.
    value, _ = compiled(metric)((student, teacher), labels)
    np.testing.assert_allclose(value, direct, rtol=1e-4)


@metrics
def test_gradients_reach_both_networks(name):
    metric, (student, teacher, labels) = losses.get_metric(name), batch()
    _, grads = compiled(metric)((student, teacher), labels)
    chex.assert_tree_all_finite(grads)
    for network in grads:
        for field in ("features", "logits", "maps"):
            largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(getattr(network, field)))
            assert (largest > 0) == (field in used(metric)), field


@pytest.mark.slow
@metrics
def test_vmap_is_a_loop(name):
    metric = losses.get_metric(name)
    batches = [batch(seed=seed) for seed in range(2)]
    batches = [((student, teacher), labels) for student, teacher, labels in batches]
    together = jax.vmap(compiled(metric))(*stack(batches))
    one_by_one = stack([compiled(metric)(*b) for b in batches])
    # A batched loop runs on for the slower member, and products are summed in another order.
    chex.assert_trees_all_close(together, one_by_one, rtol=1e-3, atol=1e-5)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@metrics
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_is_computed_in_float32(name, dtype):
    metric, (student, teacher, labels) = losses.get_metric(name), batch()
    low = jax.tree.map(lambda a: a.astype(dtype), (student, teacher))
    value = metric(*low, labels, key=KEY)
    chex.assert_type(value, jnp.float32)
    # The same numbers, stored in float32: nothing on the way was rounded to half precision.
    single = jax.tree.map(lambda a: a.astype(jnp.float32), low)
    np.testing.assert_allclose(value, metric(*single, labels, key=KEY), rtol=1e-5)


@metrics
def test_compiled_once_a_shape(name):
    metric, again, (student, teacher, labels) = *map(losses.get_metric, [name] * 2), batch()
    other = jax.tree.map(lambda a: a + 1, (student, teacher))
    metric(student, teacher, labels, key=KEY)
    with jax.no_tracing(True):  # raises where anything is traced again
        again(*other, labels, key=KEY)


def test_a_metric_is_a_static_argument():
    metric, again = (losses.get_metric("jw2", beta=0.5, label_cost="kl") for _ in range(2))
    student, teacher, _ = batch()
    step = jax.jit(chex.assert_max_traces(lambda m, s, t: m(s, t), n=1), static_argnums=0)
    np.testing.assert_array_equal(step(metric, student, teacher), step(again, student, teacher))


def test_aux_describes_the_coupling():
    student, teacher, labels = batch()
    for function in (losses.w2, losses.cw2, losses.jw2):
        given = arguments(function, student, teacher, labels)
        (value, info), grads = jax.value_and_grad(
            lambda z, f=function, g=given: f(**{**g, "z_s": z}, has_aux=True), has_aux=True
        )(student.features)
        assert value == function(**given)
        chex.assert_shape(info.coupling, (24, 24))
        chex.assert_type([info.converged, info.n_iters], [bool, int])
        chex.assert_tree_all_finite(grads)
        np.testing.assert_allclose(info.coupling.sum(), 1, rtol=1e-5)


def test_the_task_alone():
    student, teacher, labels = batch()
    for metric in (None, "none"):
        loss, terms = losses.distillation_loss(
            student, teacher, labels, metric=metric, coef=3.0, task_coef=2.0
        )
        assert terms.distillation == 0
        assert loss == 2 * terms.task
        log_p = jax.nn.log_softmax(student.logits)
        np.testing.assert_allclose(terms.task, -log_p[jnp.arange(24), labels].mean(), rtol=1e-6)


def test_a_loss_is_a_metric_and_so_is_a_function_of_ones_own():
    *networks, labels = batch()

    def value(metric):
        total, terms = losses.distillation_loss(*networks, labels, metric=metric, coef=1.0, key=KEY)
        assert total == terms.task + terms.distillation
        return terms.distillation

    partial = functools.partial
    for given, name in (
        (losses.cw2, "cw2"),
        (losses.mmd, "mmd-rbf"),
        (losses.sw2, "sw2"),
        (partial(losses.w2, solver="sinkhorn", epsilon=0.1), "w2:solver=sinkhorn:epsilon=0.1"),
        (partial(losses.mmd, kernel="linear"), "mmd-linear"),
    ):
        assert value(given) == value(name)
        assert losses._resolve.resolve(given) == losses.get_metric(name)

    def plain(student, teacher, labels):
        return jnp.mean(student.features - teacher.features) ** 2

    def drawing(student, teacher, labels, *, key):
        return plain(student, teacher, labels) + 0 * jax.random.uniform(key)

    def open_to_all(student, teacher, labels, **given):
        assert given["key"] is KEY
        return plain(student, teacher, labels)

    expected = jnp.mean(networks[0].features - networks[1].features) ** 2
    for metric in (plain, drawing, open_to_all):
        np.testing.assert_allclose(value(metric), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown solver 'no'"):
        value(partial(losses.w2, solver="no"))
