"""The learning rates of each protocol, epoch by epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.runs.protocols import PROTOCOLS


def rates(name, epochs, steps_per_epoch=10):
    """Return the learning rate of each epoch's first and last step, as the optimizer applies it."""
    optimizer = PROTOCOLS[name].optimizer(epochs, steps_per_epoch)
    first = []
    params = jnp.zeros(())
    # Without momentum's past, a unit gradient's update is the rate.
    fresh = optimizer.init(params)
    for step in (e * steps_per_epoch + s for e in range(epochs) for s in (0, steps_per_epoch - 1)):

        def at(leaf, step=step):
            return jnp.asarray(step) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf

        update, _ = optimizer.update(jnp.ones(()), jax.tree.map(at, fresh), params)
        first.append(-float(update))
    return np.array(first).reshape(epochs, 2)


def test_kd2m_is_the_papers_schedule():
    found = rates("kd2m", 15)
    t = np.arange(15) / 15
    expected = 1e-4 + (1e-2 - 1e-4) * (1 + np.cos(np.pi * t)) / 2  # torch's CosineAnnealingLR
    np.testing.assert_allclose(found, np.stack([expected, expected], 1), rtol=1e-4)
    assert (PROTOCOLS["kd2m"].epochs, PROTOCOLS["kd2m"].batch_size) == (15, 128)


def test_crd_drops_at_150_180_and_210_of_240():
    found = rates("crd", 240, 4)
    expected = 0.05 * 0.1 ** sum((np.arange(240) >= e).astype(float) for e in (150, 180, 210))
    np.testing.assert_allclose(found, np.stack([expected, expected], 1), rtol=1e-4)
    assert (PROTOCOLS["crd"].epochs, PROTOCOLS["crd"].batch_size) == (240, 64)
    # Weight decay 5e-4 before the momentum, as torch's SGD has it.
    optimizer = PROTOCOLS["crd"].optimizer(240, 4)
    update, _ = optimizer.update(jnp.zeros(()), optimizer.init(jnp.ones(())), jnp.ones(()))
    np.testing.assert_allclose(update, -0.05 * 5e-4, rtol=1e-5)


def test_digits_falls_by_a_cosine_to_nothing():
    found = rates("digits", 20).ravel()
    assert found[0] == pytest.approx(0.1) and found[-1] < 1e-4
    assert (np.diff(found) < 0).all()


@pytest.mark.parametrize("epochs", [1, 3, 4, 8, 240])
def test_the_crd_schedule_loses_no_drop(epochs):
    """Of few epochs several drops fall together: each counts all the same."""
    optimizer = PROTOCOLS["crd"].optimizer(epochs, 10)
    state = optimizer.init({"w": jnp.ones(1)})
    state = optax.tree_utils.tree_set(state, count=jnp.asarray(10 * epochs + 1))
    updates, _ = optimizer.update({"w": jnp.ones(1)}, state, {"w": jnp.zeros(1)})
    np.testing.assert_allclose(updates["w"], -0.05 * 1e-3, rtol=1e-4)
