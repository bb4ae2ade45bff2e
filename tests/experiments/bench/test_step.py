"""A step with a metric beside one without."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import (
    step,
)
from kd2m_jax import from_nnx, losses


def flops(networks, metric):
    teacher, student, x, labels = networks
    compiled, *_ = step.program(from_nnx(student), from_nnx(teacher), x, labels, metric)
    return compiled.cost_analysis()["flops"]


def test_a_step_is_compared_with_one_that_runs_the_teacher_too():
    small, large = (
        flops(step.setting((f"mlp-{w}-4", "mlp-6-4", (4, 4, 1)), 8), "none") for w in (8, 512)
    )
    assert large - small > 0.9 * 2 * 8 * (512 - 8) * (16 + 4)


@pytest.mark.slow
def test_a_steps_metrics_are_those_the_networks_suit(tmp_path):
    run = step.step(tmp_path, (("mlp-8-4", "mlp-6-4", (4, 4, 1)),), batch=8, repeats=1)
    (rows, notes), names = run, set(losses.METRICS)
    assert {row["metric"] for row in rows} == names - {"nst", "wkd-f"} | {"none"}
    assert rows[0]["ratio"] == 1 and rows[1]["answer"] == "right"
    assert "mlp-8-4 to mlp-6-4" in notes[0] and "random images" in notes[-1]


@pytest.mark.slow
def test_a_steps_metrics_of_maps_and_the_projector_of_wkd_f():
    *_, wkd = step.beside_none(("resnet8", "resnet8", (8, 8, 1)), ["nst", "wkd-f"], 8, 1)
    assert wkd["metric"] == "wkd-f" and np.isfinite(wkd["ratio"])


def test_a_step_on_digits_has_a_trained_teacher_and_a_student_on_its_way(monkeypatch):
    monkeypatch.setattr(step, "EPOCHS", (30, 1))
    teacher, student, x, labels = step.setting(("mlp-64-8", "mlp-8-8", "digits"), 128)
    right = [(jnp.argmax(net(x).logits, 1) == labels).mean() for net in (teacher, student)]
    assert right[0] > 0.9 > right[1]
    assert x.shape == (128, 8, 8, 1)
