"""How time and memory grow with samples, features and classes: as each docstring says.

What XLA counts for the compiled program stands for both: operations (a loop's body once, and
nothing of what LAPACK does) and temporary bytes. Bounds from above; in n from below too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd2m_jax import Outputs, losses

pytestmark = pytest.mark.slow
# The exponents of time in n, d and k, and of memory in them; of maps d is the channels.
QUADRATIC, LINEAR = ((2, 1, 0), (2, 1, 0)), ((1, 1, 0), (1, 1, 0))
GROWTH = {
    "w2": QUADRATIC,
    "w2:solver=sinkhorn": QUADRATIC,
    "cw2": QUADRATIC,
    "jw2": ((2, 1, 1), (2, 1, 1)),
    "lohit": QUADRATIC,
    "gw2": ((3, 1, 0), (2, 1, 0)),
    "sw2": LINEAR,
    "scf": LINEAR,
    "gaussian-w2": LINEAR,
    "gaussian-w2:covariance=diagonal": LINEAR,
    "gaussian-cw2": ((3, 1, 0), (2, 1, 0)),
    "gaussian-kl": LINEAR,
    "gaussian-kl:covariance=diagonal": LINEAR,
    "gaussian-ckl": ((3, 1, 0), (2, 1, 0)),
    "mmd-linear": LINEAR,
    "cmmd-linear": QUADRATIC,
    **{f"{m}-{kernel}": QUADRATIC for m in ("mmd", "cmmd") for kernel in
       ("polynomial", "rbf", "energy")},
    "procrustes": LINEAR,
    "gram": LINEAR,
    "cka": LINEAR,
    "kd": ((1, 0, 1), (1, 0, 1)),
    "nst": ((1, 2, 0), (1, 2, 0)),
    "wkd-l": ((1, 0, 2), (1, 0, 1)),
    "wkd-f": LINEAR,
    "l2": LINEAR,
}  # fmt: skip


@functools.cache
def counted(name, n, d, k):
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    metric = losses.get_metric(name)
    network = Outputs(array(n, d), array(n, k), (array(n, 4, 4, d),))
    both = jax.value_and_grad(lambda s, t, y: metric(s, t, y, key=jax.random.key(0)))
    lowered = jax.jit(both).lower(network, network, array(n, dtype=jnp.int32))
    program = lowered.compile()
    return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", GROWTH)
def test_time_and_memory_grow_as_the_docstrings_say(name):
    assert "Cost: " in losses.METRICS[name.partition(":")[0]].function.__doc__
    time, memory = GROWTH[name]
    # The one that grows is the largest, so that its leading term shows.
    for i, sizes in enumerate(((1024, 64, 10), (64, 1024, 10), (256, 32, 64))):
        doubled = tuple(2 * size if i == j else size for j, size in enumerate(sizes))
        pairs = zip(counted(name, *doubled), counted(name, *sizes), strict=True)
        exponents = [np.log2(max(more, 1) / max(less, 1)) for more, less in pairs]
        assert exponents[0] <= time[i] + 0.1 and exponents[1] <= memory[i] + 0.1, (name, "ndk"[i])
        if i == 0 and name != "gaussian-cw2":  # whose cubic part is LAPACK's
            assert exponents[0] >= time[0] - 0.2, name


def test_every_loss_is_in_the_table():
    assert {name.partition(":")[0] for name in GROWTH} == set(losses.METRICS)
