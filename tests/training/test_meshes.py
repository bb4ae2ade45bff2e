"""Steps and fit() under a mesh that the caller has set, with arrays that lie on it."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kd2m_jax import (
    fit,
    from_nnx,
    init_state,
    make_train_step,
    models,
    pmap_step,
    shard_map_step,
)

OPTIONS = {"metric": "w2", "coef": 0.1}


def mlp(seed):
    return models.MLP((8,), 3, in_features=5, rngs=nnx.Rngs(seed))


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 5)).astype(np.float32), np.arange(32) % 3


def by_fit(batch):
    options = {"batch_size": 16, "epochs": 1, "optimizer": optax.sgd(0.1), "eval_data": batch}
    last = fit(mlp(0), batch, teacher=mlp(1), **options, **OPTIONS).history[-1]
    return last["loss"], last["test_loss"]


@functools.cache
def made(make, mesh):
    """Make a step under the mesh that is set: one for a batch that is split and one that is not."""
    network, optimizer = from_nnx(mlp(0)), optax.sgd(0.1)
    return network, optimizer, make(network, network, optimizer, **OPTIONS)


def by_step(make):
    def run(batch):
        network, optimizer, step = made(make, jax.sharding.get_abstract_mesh())
        state = init_state(network, optimizer, data()[0], key=jax.random.key(0))
        teacher = from_nnx(mlp(1)).init(None, None)
        for _ in range(2):
            state, metrics = step(state, teacher, batch)
        return float(metrics["loss"])

    return run


@functools.cache
def without_mesh(run):
    return run(data())


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        (AxisType.Explicit, True),
        pytest.param(AxisType.Explicit, False, marks=slow),
        pytest.param(AxisType.Auto, True, marks=slow),
        pytest.param(AxisType.Auto, False, marks=slow),
    ],
)
@pytest.mark.parametrize(
    "run",
    [
        by_fit,
        pytest.param(by_step(make_train_step), marks=slow),
        pytest.param(by_step(pmap_step), marks=slow),
        pytest.param(by_step(shard_map_step), marks=slow),
    ],
    ids=["fit", "train", "pmap", "shard_map"],
)
def test_a_mesh_of_the_callers_changes_nothing(run, split, kind):
    expected = without_mesh(run)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        batch = data()
        if split:
            batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(run(batch), expected, rtol=1e-5)
        assert jax.sharding.get_abstract_mesh().axis_names == ("data",)  # it is as it was
