"""What a loss takes on a GPU or a TPU in place of a CPU's way, computed here on the CPU."""

import jax
import numpy as np
import pytest
from clouds import draw
from draws import single

from kd2m_jax import Outputs, losses

slow = pytest.mark.slow
PLATFORMS = ("cuda", "tpu")
# Without `solver="auto"`, whose exact plan on a CPU is another one than Sinkhorn's.
METRICS = (
    "gaussian-w2",
    "gaussian-cw2",
    "gaussian-cw2:rotation=true",
    "cw2:rotation=true:solver=sinkhorn",
    "procrustes",
    "gram",
)
names = pytest.mark.parametrize(
    "name", [n if "gaussian-cw2:" in n else pytest.param(n, marks=slow) for n in METRICS]
)
# Fewer samples per class than features: the rotation's directions are few among many.
SHAPES = (
    (40, 24, 4),
    *(pytest.param((n, d, k), marks=slow) for n, d, k in [(128, 64, 10), (60, 16, 3)]),
)


def found(name, x, y, labels):
    """Return the value and the student's gradient, by a program of its own."""
    jax.clear_caches()
    metric, (x, y, labels) = losses.get_metric(name), single(x, y, labels)

    def value(x):
        return metric(Outputs(x, x), Outputs(y, y), labels)

    return jax.jit(jax.value_and_grad(value))(x)


@names
@pytest.mark.parametrize("shape", SHAPES)
def test_every_platform_has_the_same_value_and_gradient(monkeypatch, name, shape):
    n, d, classes = shape
    clouds = draw("nearly matched", n, d, classes=classes, seed=0)
    value, gradient = found(name, *clouds)
    for platform in PLATFORMS:

        def chosen(*given, default, platform=platform, **ways):
            return ways.get(platform, default)(*given)

        monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
        other, slope = found(name, *clouds)
        np.testing.assert_allclose(other, value, rtol=1e-3, err_msg=platform)
        assert np.linalg.norm(slope - gradient) < 1e-2 * np.linalg.norm(gradient), platform
