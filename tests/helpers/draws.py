"""Logits, feature maps and costs between classes, as networks make them."""

import jax.numpy as jnp
import numpy as np


def single(*arrays):
    return [jnp.asarray(a, jnp.float32 if a.dtype.kind == "f" else jnp.int32) for a in arrays]


def draw_logits(n=24, k=7, *, scale=3.0, seed=0):
    """Student's and teacher's logits and the labels, float64; the teacher is mostly right."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    h_t = scale * rng.normal(size=(n, k)) + 2 * scale * np.eye(k)[labels]
    return h_t + scale / 2 * rng.normal(size=(n, k)), h_t, labels


def draw_maps(n=5, size_s=(4, 4, 6), size_t=(4, 4, 9), *, seed=0):
    """Draw maps after a ReLU, float64; the teacher's last channel is dead."""
    rng = np.random.default_rng(seed)
    maps_s, maps_t = (np.maximum(rng.normal(0.3, size=(n, *size)), 0) for size in (size_s, size_t))
    maps_t[..., -1] = 0
    return maps_s, maps_t


def draw_cost(k, seed=0):
    rng = np.random.default_rng(seed)
    cost = 0.7 * rng.uniform(size=(k, k))
    cost = (cost + cost.T) / 2
    return cost - np.diag(np.diag(cost))
