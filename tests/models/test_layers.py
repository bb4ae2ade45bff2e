"""Layers: initial weights that compile quickly, with the bits that they had."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kd2m_jax.models import _layers

# Each initialiser of ours, what it has to draw, and the shapes of some weights.
INITIALISERS = {
    "convolution": (
        _layers._he_normal_over_outputs,
        lambda key, shape, dtype: (
            jax.random.normal(key, shape, dtype) * jnp.sqrt(dtype(2 * shape[-2] / np.prod(shape)))
        ),
        [(3, 3, 4, 8), (1, 1, 8, 6)],
    ),
    "hidden layer": (_layers._he_normal, nnx.initializers.he_normal(), [(64, 12)]),
    "head": (
        _layers._uniform,
        nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        [(32, 10)],
    ),
}


@pytest.mark.parametrize("ours, theirs, shapes", INITIALISERS.values(), ids=INITIALISERS)
def test_initial_weights_are_those_of_the_field(ours, theirs, shapes):
    # To the rounding of unoptimised code, which conftest asks for; the slow test asks for bits.
    for shape in shapes:
        key = jax.random.key(3)
        drawn = ours(key, shape, jnp.float32)
        np.testing.assert_allclose(drawn, theirs(key, shape, jnp.float32), rtol=1e-5, atol=1e-6)
        traced = jax.jit(lambda key: ours(key, shape, jnp.float32))(key)  # noqa: B023
        np.testing.assert_allclose(drawn, traced, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_initial_weights_keep_their_bits_in_optimised_code():
    code = """
import jax, jax.numpy as jnp
from test_layers import INITIALISERS
for name, (ours, theirs, shapes) in INITIALISERS.items():
    for shape in shapes:
        drawn = (draw(jax.random.key(3), shape, jnp.float32) for draw in (ours, theirs))
        assert jnp.array_equal(*drawn), (name, shape)
"""
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)


def test_other_backends_get_no_compiler_options(monkeypatch):
    key, shape = jax.random.key(3), (64, 33)
    plain = jax.random.normal(key, shape)
    assert (_layers._normal(key, shape) != plain).any()  # level 1 here, level 0 by conftest
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(_layers._normal(key, shape), plain)
