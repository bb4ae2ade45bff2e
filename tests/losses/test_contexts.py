"""Losses where users call them: in their own shard_map, on explicit meshes, under strict rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import compiled
from walk import VARIANTS, batch, label

from kd2m_jax import losses
from kd2m_jax.losses._polar import by_products, tolerance

KEY = jax.random.key(0)
SHARDS = 2
N = 24  # as in `numerics`, whose programs are then these


def value_and_grad(name, options):
    metric = losses.get_metric(name, **options)
    return jax.value_and_grad(lambda networks, labels: metric(*networks, labels, key=KEY))


def expected(name, options, networks, labels):
    """Return value and gradients outside any context: one program for all tests of a metric."""
    return compiled(losses.get_metric(name, **options))(networks, labels)


def arrays(n=N):
    student, teacher, labels = batch(n)
    return (student, teacher), labels


def assert_close(found, expected):
    """Values, and gradients up to 1% of the largest: sums are taken in another order."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(b).max())

    jax.tree.map(close, found, expected)


# Compiling is what these tests wait for: each is fast for the metrics whose code its context
# touches most, and walks the rest with the slow tests.
def walked(fast):
    """Return the variants as pytest's parameters, fast for a few metrics by default."""
    given = []
    for name, options in VARIANTS:
        marks = [] if name in fast and not options else [pytest.mark.slow]
        given.append(pytest.param(name, options, id=label(name, options), marks=marks))
    return pytest.mark.parametrize(("name", "options"), given)


@walked(("w2", "gaussian-cw2", "gaussian-kl", "wkd-l"))
def test_inside_ones_own_shard_map(name, options):
    """With its default checks: each shard's loss is that of its rows, and its gradient too."""
    both, (networks, labels) = value_and_grad(name, options), arrays(N * SHARDS)
    mesh = jax.make_mesh((SHARDS,), ("i",), axis_types=(AxisType.Auto,))

    def per_shard(networks, labels):
        value, grads = both(networks, labels)
        return value[None], grads

    split = jax.jit(jax.shard_map(per_shard, mesh=mesh, in_specs=P("i"), out_specs=P("i")))
    values, grads = split(networks, labels)
    values, grads, networks, labels = jax.tree.map(np.asarray, (values, grads, networks, labels))
    for k in range(SHARDS):
        mine = slice(N * k, N * (k + 1))
        rows = lambda tree, mine=mine: jax.tree.map(lambda a: a[mine], tree)  # noqa: E731
        alone = expected(name, options, rows(networks), labels[mine])
        assert_close((values[k], rows(grads)), alone)


@walked(("cw2", "sw2", "gaussian-w2"))
def test_batch_split_over_an_explicit_mesh(name, options):
    """The loss is that of the whole batch, and a gradient is split as its array is."""
    both, given = jax.jit(value_and_grad(name, options)), arrays()
    whole = expected(name, options, *given)
    mesh = jax.make_mesh((SHARDS,), ("data",))  # explicit by default
    split = jax.device_put(given, NamedSharding(mesh, P("data")))
    assert_close(losses.get_metric(name, **options)(*split[0], split[1], key=KEY), whole[0])
    with jax.set_mesh(mesh):
        value, grads = both(*split)
    assert_close((value, grads), whole)
    specs = {jax.typeof(leaf).sharding.spec[0] for leaf in jax.tree.leaves(grads)}
    assert specs == {"data"}


@walked(("w2", "gaussian-cw2"))
def test_strict_promotion(name, options):
    """Which is a matter of tracing: nothing is compiled."""
    metric, (networks, labels) = losses.get_metric(name, **options), arrays()
    with jax.numpy_dtype_promotion("strict"):
        both = value_and_grad(name, options)
        assert jax.eval_shape(both, networks, labels)[0].dtype == jnp.float32
        jax.eval_shape(lambda: metric(*networks, labels, key=KEY))  # arrays that are no tracers


@walked(("gaussian-cw2",))
def test_without_jit(name, options):
    both, given = value_and_grad(name, options), arrays()
    with jax.disable_jit():
        found = both(*given)
    assert_close(found, expected(name, options, *given))


def test_the_whole_objective(metric="l2+kd"):
    (student, teacher), labels = arrays()

    def objective(student, teacher, labels):
        return losses.distillation_loss(student, teacher, labels, metric=metric, coef=0.5)[0]

    both = jax.jit(jax.value_and_grad(objective))
    expected = both(student, teacher, labels)
    with jax.numpy_dtype_promotion("strict"):
        assert_close(both(student, teacher, labels), expected)
    mesh = jax.make_mesh((SHARDS,), ("data",))
    split = jax.device_put((student, teacher, labels), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        assert_close(both(*split), expected)
    mesh = jax.make_mesh((SHARDS,), ("i",), axis_types=(AxisType.Auto,))
    mean = jax.shard_map(
        lambda *given: jax.lax.pmean(objective(*given), "i"),
        mesh=mesh, in_specs=P("i"), out_specs=P(),
    )  # fmt: skip
    assert_close(jax.jit(mean)(student, teacher, labels), expected[0])  # a mean over examples


def test_costs_between_classes():
    (_, teacher), labels = arrays()
    expected = losses.class_cost_matrix(teacher.features, labels, num_classes=4)
    mesh = jax.make_mesh((SHARDS,), ("data",))
    split = jax.device_put((teacher.features, labels), NamedSharding(mesh, P("data")))
    with jax.numpy_dtype_promotion("strict"):
        assert_close(losses.class_cost_matrix(*split, num_classes=4), expected)


def test_the_accelerators_polar_factor_inside_shard_map():
    mesh = jax.make_mesh((SHARDS,), ("i",), axis_types=(AxisType.Auto,))
    k = jnp.concatenate([jnp.eye(3), -jnp.eye(3)]) / 2
    factor = jax.shard_map(
        lambda k: by_products(k, tolerance(k))[0], mesh=mesh, in_specs=P("i"), out_specs=P("i")
    )
    np.testing.assert_allclose(jax.jit(factor)(k), 2 * k, atol=1e-5)
