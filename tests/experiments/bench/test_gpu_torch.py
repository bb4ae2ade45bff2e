"""PyTorch's epoch is of the same networks."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.bench import (
    gpu,
    step,
)


@pytest.mark.slow
def test_the_torch_epoch_runs_and_is_of_the_same_networks(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    from experiments.bench import gpu_torch

    for depths, name in ((gpu_torch.DEPTHS[n], n) for n in gpu.PAIR):
        theirs = gpu_torch.ResNet(depths)
        ours = nnx.eval_shape(lambda name=name: step.build(name, (32, 32, 3), 0, jnp.float32))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param)))
        assert sum(p.numel() for p in theirs.parameters()) == count
        features, logits = theirs(torch.zeros(2, 3, 32, 32))
        assert (features.shape, logits.shape) == ((2, 512), (2, 10))
    data = gpu.random_images(8)
    x = gpu_torch._augmented(torch.tensor(data.train[0]).permute(0, 3, 1, 2), data)
    assert x.shape == (8, 3, 32, 32)
    assert (x.amin((2, 3)) >= -torch.tensor(data.mean) / torch.tensor(data.std) - 1e-5).all()
    monkeypatch.setitem(gpu_torch.DEPTHS, "resnet8", (1, 1, 1, 1))
    pair = ("resnet8", "resnet8")
    rows, notes = gpu_torch.gpu_torch(tmp_path, pair, images=16, batch=8, repeats=1)
    assert [row["what"] for row in rows][:2] == ["kd2m_jax", "torch + emd"] and len(rows) == 5
    assert len(notes) == 3 and "input pipeline" in notes[-1]
