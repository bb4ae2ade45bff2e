"""restore(): a student as its checkpoint folder has it."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import CheckpointError, Network, fit, from_nnx, models, projected, restore

N, D = 96, 10


def data(seed=0):
    x, _, labels = draw("clustered", N, D, classes=3, seed=seed)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed, width=6):
    return models.MLP((8, width), 3, in_features=D, rngs=nnx.Rngs(seed))


def trained(student, folder, **options):
    options = {"optimizer": optax.sgd(1.0), "epochs": 3, "eval_data": data(1)} | options
    return fit(student, data(), batch_size=16, checkpoint_dir=folder, seed=5, **options)


def assert_same(found, expected):
    assert type(found) is type(expected)
    one, other = (jax.tree.leaves_with_path(nnx.state(m)) for m in (found, expected))
    for (path, a), (other_path, b) in zip(one, other, strict=True):
        assert path == other_path
        np.testing.assert_array_equal(a, b)


def test_an_nnx_student_last_and_best(tmp_path):
    x, labels = data()
    wrong = (x, (labels + 1) % 3)  # so that the first epoch is the best one
    result = trained(mlp(1), tmp_path, eval_data=wrong, save_every=0)
    assert_same(restore(tmp_path, mlp(2)), result.student)
    best = restore(tmp_path, mlp(2), "best")
    assert_same(best, result.best)
    assert not np.array_equal(best.fc.kernel[...], result.student.fc.kernel[...])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.relu(nn.Dense(6)(x)))
        return x, nn.Dense(3)(x)


@pytest.mark.parametrize("dim", [None, 12])
@pytest.mark.parametrize("make", [lambda: mlp(1), Linen], ids=["nnx", "linen"])
def test_what_comes_back_is_what_fit_returned_with_a_projector_too(make, dim, tmp_path):
    student = make() if dim is None else projected(make(), dim)
    options = {"teacher": mlp(0, 12), "metric": "l2", "coef": 0.1} if dim else {}
    result = trained(student, tmp_path, **options)
    for which, expected in (("last", result.student), ("best", result.best)):
        found = restore(tmp_path, make(), which)
        if isinstance(expected, nnx.Module):
            assert_same(found, expected)
        else:
            same = jax.tree.map(lambda a, b: bool((a == b).all()), found, dict(expected))
            assert all(jax.tree.leaves(same)) and set(found) == {"params", "batch_stats"}


def test_a_population_and_a_network_of_ones_own(tmp_path):
    students = [mlp(1), mlp(2, 5)]
    results = trained(students, tmp_path / "two")
    for found, result in zip(restore(tmp_path / "two", students), results, strict=True):
        assert_same(found, result.student)
    with pytest.raises(CheckpointError, match="holds 2 students, and there are 1 models"):
        restore(tmp_path / "two", mlp(1))
    wrapped = from_nnx(mlp(1))
    own = Network(wrapped.init, wrapped.apply)
    result = trained(own, tmp_path / "own")
    found = restore(tmp_path / "own", own)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, result.student)
    assert all(jax.tree.leaves(same))


def test_mistakes_are_named(tmp_path):
    trained(mlp(1), tmp_path / "run", epochs=1)
    with pytest.raises(CheckpointError, match="of another network than this MLP"):
        restore(tmp_path / "run", mlp(1, 7))
    with pytest.raises(ValueError, match="which must be 'last' or 'best', got 'first'"):
        restore(tmp_path / "run", mlp(1), "first")
    with pytest.raises(CheckpointError, match="there is no folder"):
        restore(tmp_path / "nothing", mlp(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*empty can be read"):
        restore(tmp_path / "empty", mlp(1))
    with pytest.raises(CheckpointError, match=r"without projected\(\)"):
        restore(tmp_path / "run", projected(mlp(1), 12))


def test_a_save_asks_nobody_for_sigterm(monkeypatch, tmp_path):
    """Several processes ask JAX in numbers of their own, which orbax's would overtake."""
    asked = []
    question = "jax.experimental.multihost_utils.reached_preemption_sync_point"
    monkeypatch.setattr(question, lambda number: asked.append(number) or False)
    trained(mlp(1), tmp_path, save_every=0.0)
    assert (tmp_path / "last").is_dir() and asked == []
