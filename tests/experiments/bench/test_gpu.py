"""The suites for a GPU, on the CPU."""

import jax.numpy as jnp
import pytest

from experiments.bench import (
    gpu,
    step,
)


@pytest.mark.slow
def test_gpu_suites_run_where_there_is_none(monkeypatch, tmp_path):
    pair = ("resnet8", "resnet8")
    monkeypatch.setattr(gpu, "SHAPE", (8, 8, 3))
    rows, notes = gpu.gpu_step(tmp_path, pair, batches=(4,), metrics=("w2",), repeats=1)
    assert [(row["dtype"], row["metric"]) for row in rows] == [
        (dtype, metric) for dtype in ("float32", "bfloat16") for metric in ("none", "w2")
    ]
    assert all("target at most 1.05" in note for note in notes)
    [row], [note] = gpu.gpu_epoch(tmp_path, pair, images=16, batch=8, repeats=2)
    assert row["images/s"] > 0 and row["utilisation"] is None and "No peak" in note


def test_model_flops_and_peaks():
    network = step.build("mlp-64-32", gpu.SHAPE, 0, jnp.float32)
    products = 2 * (32 * 32 * 3 * 64 + 64 * 32 + 32 * 10)
    assert products <= gpu.forward_flops(network) < 1.02 * products
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12,
             "Tesla T4": 65e12, "NVIDIA A100-SXM4-40GB": 312e12, "cpu": None}  # fmt: skip
    assert {name: gpu.peak_flops(name) for name in names} == names
