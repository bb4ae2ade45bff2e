"""A module of one Flax framework inside a module of the other: BatchNorm sees all devices."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from kd2m_jax import fit

D = 6


class LinenPart(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(8)(x))


class NnxOutside(nnx.Module):
    def __init__(self, rngs):
        self.part = nnx.bridge.ToNNX(LinenPart(), rngs=rngs)
        self.part.lazy_init(np.ones((2, D), np.float32))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        features = nnx.relu(self.part(x, mutable=["batch_stats"]))
        return features, self.head(features)


class NnxPart(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(D, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


class LinenOutside(nn.Module):
    @nn.compact
    def __call__(self, x):
        features = nn.relu(nnx.bridge.to_linen(NnxPart, name="part")(x))
        return features, nn.Dense(3)(features)


@pytest.mark.parametrize("make", [lambda: NnxOutside(nnx.Rngs(0)), LinenOutside])
def test_batch_norm_is_synchronised_across_the_bridge(make):
    """Each device's part of the batch lies elsewhere, so its own mean is not the batch's."""
    rng, labels = np.random.default_rng(0), np.arange(32) % 3
    x = (rng.normal(size=(32, D)) + 10 * (np.arange(32) // 8)[:, None]).astype(np.float32)
    options = {"epochs": 1, "optimizer": optax.sgd(0.1)}
    losses = [
        fit(make(), [(x, labels)] * 2, devices=jax.devices()[:n], **options).history[-1]["loss"]
        for n in (1, 4)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
