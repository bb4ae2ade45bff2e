"""A loss against its float64 oracle: value, and gradients by finite differences."""

import functools

import jax
import numpy as np
from draws import single
from reference import oracles


def check(loss, oracle, *arrays, atol=0.0):
    """Value against a float64 oracle, both gradients against finite differences of it."""
    value, gradients = compiled(loss)(*single(*arrays))
    np.testing.assert_allclose(value, oracle(*arrays), rtol=1e-3, atol=atol)
    for k, gradient in enumerate(np.asarray(g, np.float64) for g in gradients):
        noise = np.random.default_rng(k).normal(size=gradient.shape)
        for direction in (gradient, noise):
            direction = direction * np.linalg.norm(arrays[k]) / np.linalg.norm(direction)

            def along(a, k=k):
                return oracle(*arrays[:k], a, *arrays[k + 1 :])

            expected = oracles.directional_derivative(along, arrays[k], direction)
            largest = np.linalg.norm(gradient) * np.linalg.norm(direction)
            actual = (gradient * direction).sum()
            np.testing.assert_allclose(actual, expected, rtol=2e-2, atol=2e-3 * largest)


@functools.cache
def compiled(loss):
    """Value and gradients in student and teacher."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
