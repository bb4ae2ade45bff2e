"""What accelerators are to run, lowered for them on the CPU: the branches that no other test sees.

Lowering ends before XLA's own compiler: it finds an operation without an implementation on the
platform, and shapes or types that differ between the platforms' branches.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from walk import VARIANTS, batch, label

from kd2m_jax import from_nnx, init_state, losses, pmap_step, shard_map_step

PLATFORMS = ("cuda", "tpu")
platforms = pytest.mark.parametrize("platform", PLATFORMS)


@functools.cache
def traced(name, *options):
    """Return a metric's value and its gradients with respect to both networks."""
    metric, key = losses.get_metric(name, **dict(options)), jax.random.key(0)
    *networks, labels = batch()
    of_networks = jax.value_and_grad(lambda networks: metric(*networks, labels, key=key))
    return jax.jit(of_networks).trace(networks)


def lowered(traced, platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "lapack_" not in text  # the CPU's implementations
    return text


@platforms
@pytest.mark.parametrize(("name", "options"), [pytest.param(*v, id=label(*v)) for v in VARIANTS])
def test_value_and_gradient_of_every_loss_lower(name, options, platform):
    assert "stablehlo" in lowered(traced(name, *options.items()), platform)


@platforms
def test_accelerators_take_the_polar_factor_by_products(platform):
    program = traced("gaussian-cw2")
    assert re.search("svd|gesdd", program.lower(lowering_platforms=("cpu",)).as_text())
    assert not re.search("svd|gesv|eigh|syevd", lowered(program, platform), re.IGNORECASE)


class Net(nnx.Module):
    """A convolution, batch statistics and dropout: what a step has to carry along."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.conv, self.norm = nnx.Conv(1, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        features = self.dropout(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))
        return features, self.head(features)


@functools.cache
def traced_step(make_step):
    student, teacher = from_nnx(Net(0)), from_nnx(Net(1))
    n = 4 * jax.device_count()
    x, labels, optimizer = jnp.ones((n, 8, 8, 1)), jnp.arange(n) % 3, optax.adam(1e-3)
    step = make_step(student, teacher, optimizer, metric="jw2", coef="auto")
    state = init_state(student, optimizer, x, key=jax.random.key(0))
    return jax.jit(step).trace(state, teacher.init(None, x), (x, labels))


@pytest.mark.filterwarnings("ignore:.*includes a pmap")  # jax < 0.8: nothing runs here
@platforms
@pytest.mark.parametrize("make_step", [pmap_step, shard_map_step])
def test_a_whole_step_lowers(make_step, platform):
    text = lowered(traced_step(make_step), platform)
    assert "all_gather" in text and "all_reduce" in text
