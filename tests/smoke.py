"""What must work with any versions that pyproject.toml allows, in two minutes: `.ci/smoke` runs it.

pytest collects this file only where it is named. The whole suite runs with one set of versions.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from walk import batch

import kd2m_jax
from kd2m_jax import fit, losses, models

ROOT = Path(__file__).parents[1]


def test_everything_public_imports():
    for name in kd2m_jax.__all__:
        assert getattr(kd2m_jax, name) is not None
    for module in pkgutil.walk_packages([str(ROOT / "kd2m_jax")], "kd2m_jax."):
        importlib.import_module(module.name)


@pytest.mark.parametrize("name", losses.METRICS)
def test_every_loss_has_a_value_and_a_gradient(name):
    metric, key = losses.get_metric(name), jax.random.key(0)
    *networks, labels = batch(12, 4, logits=6)
    of_networks = jax.value_and_grad(lambda networks: metric(*networks, labels, key=key))
    value, gradient = jax.jit(of_networks)(networks)
    assert value > 0
    chex.assert_tree_all_finite(gradient)
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_fit_distils_and_resumes(tmp_path):
    x = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
    labels = (x[:, 0, 0, 0] > 0).astype(int)

    def network(seed):
        return models.resnet8(2, in_channels=1, rngs=nnx.Rngs(seed))

    teacher = fit(network(0), (x, labels), batch_size=32, max_steps=2, eval_data=(x, labels))

    def distil(**options):
        options |= {"metric": "cw2", "batch_size": 32, "optimizer": optax.adam(1e-3)}
        return fit(network(1), (x, labels), teacher=teacher.student, **options)

    distil(epochs=1, checkpoint_dir=tmp_path)
    resumed, whole = distil(epochs=2, checkpoint_dir=tmp_path), distil(epochs=2)
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(r.student)) for r in (resumed, whole)))


def shown(*command):
    """Return what a command prints, as a user runs it: with the compiler settings of its choice."""
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_newcomers_command(tmp_path):
    table = shown("experiments.digits", "--metric=jw2", "--max-steps=12", f"--out={tmp_path}/run")
    for row in ("teacher", "student alone", "distilled student"):
        assert row in table


def test_help():
    assert "--metrics" in shown("experiments.table", "--help")
    assert "--suite" in shown("experiments.bench", "--help")
