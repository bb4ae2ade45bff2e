"""How often a run traces and compiles: once, whatever the last batches hold."""

import jax
import numpy as np
import optax
from flax import nnx

from kd2m_jax import Network, fit, from_nnx, models


def test_one_trace_of_the_step_and_one_of_evaluation():
    """97 examples leave one over an epoch, and the 1,003 of evaluation fill two batches and 3."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(1003, 4)).astype(np.float32), np.arange(1003) % 3
    traces, compiled, at_ends = [], [], []

    def counted(name, seed):
        inner = from_nnx(models.MLP((8,), 3, in_features=4, rngs=nnx.Rngs(seed)))

        def apply(params, state, x, *, train, rng=None):
            traces.append((name, train))
            return inner.apply(params, state, x, train=train, rng=rng)

        return Network(inner.init, apply)

    def note(event, duration_secs, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    teacher = counted("teacher", 0)
    jax.monitoring.register_event_duration_secs_listener(note)
    fit(
        counted("student", 1),
        (x[:97], labels[:97]),
        teacher=teacher,
        teacher_variables=teacher.init(None, x),
        metric="cw2",
        epochs=3,
        batch_size=16,
        eval_data=(x, labels),
        optimizer=optax.sgd(0.1),
        callbacks=[lambda record: at_ends.append(len(compiled))],
    )
    assert sorted(traces) == [("student", False), ("student", True), ("teacher", False)]
    assert len(at_ends) == 3 and at_ends[0] > 0
    assert at_ends[1] == at_ends[2]  # the second epoch still copies the best parameters once
