"""Multi-layer perceptrons: their formula, their precision, and wrong arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kd2m_jax import models


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, 8, 8, 1))


def test_mlp_is_its_formula(images):
    model = models.MLP((16, 12), 10, in_features=64, rngs=nnx.Rngs(0))
    out = model(images)
    x = np.asarray(images).reshape(8, 64)
    for layer in model.hidden:
        x = np.maximum(x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), 0)
    np.testing.assert_allclose(out.features, x, atol=1e-5)
    logits = x @ np.asarray(model.fc.kernel[...]) + np.asarray(model.fc.bias[...])
    np.testing.assert_allclose(out.logits, logits, atol=1e-5)


def test_bfloat16_computes_in_it_and_keeps_float32(images):
    mlp = models.MLP((16,), 10, in_features=64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(mlp))} == {jnp.dtype("float32")}
    out = mlp(images)
    assert out.features.dtype == out.logits.dtype == jnp.float32
    assert (out.features == out.features.astype(jnp.bfloat16)).all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"at least one, got \(\)"):
        models.MLP((), 10, in_features=4, rngs=nnx.Rngs(0))
