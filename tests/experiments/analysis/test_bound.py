"""The theorem's chain over a run's training."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.analysis import bound as bounds
from kd2m_jax import Outputs


def test_the_bound_notices_what_is_out_of_order():
    rng = np.random.default_rng(0)
    z, logits = rng.normal(size=(2, 20, 4)).astype(np.float32)
    student, teacher = (Outputs(jnp.asarray(f), jnp.asarray(logits)) for f in (z + 0.3, z))
    labels = np.arange(20) % 4
    point = bounds.measure(student, teacher, labels, bounds.bandwidth(z))
    assert bounds.in_order(point)
    assert point["cross_entropy_gap"] == 0  # the same logits
    for key in ("gap", "w"):
        assert not bounds.in_order(point | {key: 2 * point["l2"]})
    # The bandwidth is the median distance, or 1.
    pairs = np.linalg.norm(z[:, None] - z, axis=2)
    assert bounds.bandwidth(z) == pytest.approx(np.median(pairs), rel=1e-4)
    assert bounds.bandwidth(0.01 * z) == 1
