"""Torch's steps on the CPU are of the same networks as ours."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.bench import step


@pytest.mark.slow
def test_the_twins_have_our_parameters_and_the_suite_runs(tmp_path):
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_cpu

    for pair, shape in ((torch_cpu.MLPS, (28, 28, 1)), (torch_cpu.RESNETS, (32, 32, 3))):
        for name in pair:
            ours, theirs = step.build(name, shape, 0), torch_cpu.network(name, shape)
            leaves = jax.tree.leaves(nnx.state(ours, nnx.Param))
            assert sum(p.numel() for p in theirs.parameters()) == sum(map(jnp.size, leaves))
            given = theirs(torch.zeros(2, shape[2], *shape[:2]))
            assert [o.shape for o in given] == [o.shape for o in ours(jnp.zeros((2, *shape)))[:2]]
    pairs = {"mlps": ("mlp-8-4", "mlp-4"), "resnets": ("resnet8", "resnet8")}
    rows, notes = torch_cpu.torch_cpu(tmp_path, **pairs, batch=8, steps=2, repeats=1)
    assert [row["what"] for row in rows] == [
        "kd2m_jax", "torch", "kd2m_jax.fit",
        "kd2m_jax", "torch", "torch, channels_last", "kd2m_jax.fit",
    ]  # fmt: skip
    assert len(notes) == 5 and all(row["ms"] > 0 for row in rows)
