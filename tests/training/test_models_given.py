"""What fit() says of models, results and lists that it cannot take, or takes otherwise."""

import numpy as np
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import fit, models
from kd2m_jax.training import _students

N, D = 96, 10


def data(seed=0):
    x, _, labels = draw("clustered", N, D, classes=3, seed=seed)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed):
    return models.MLP((8, 6), 3, in_features=D, rngs=nnx.Rngs(seed))


class LogitsAlone(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(D, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(x)


class WithDict(nnx.Module):
    """A plain dict and a list among its attributes, which are no keys of anything."""

    def __init__(self):
        self.inner, self.settings = mlp(0), {"depth": [1, 2]}

    def __call__(self, x):
        return self.inner(x)


def of_torch():
    """Make what looks like a module of torch, which need not be installed."""
    base = type("Module", (), {"__module__": "torch.nn.modules.module"})
    return type("Sequential", (base,), {"__module__": "mine"})()


@pytest.mark.parametrize(
    ("role", "model", "message"),
    [
        ("student", of_torch, "Sequential of torch: models.load_torch_weights reads"),
        ("teacher", of_torch, "Sequential of torch: models.load_torch_weights reads"),
        ("student", lambda: models.MLP, r"the class MLP: make one, MLP\(...\)"),
        ("teacher", lambda: "resnet34", "the name 'resnet34': models.build"),
        ("teacher", lambda: [mlp(0)], "a list: one network is wanted here"),
        ("student", LogitsAlone, r"one array of shape \[16, 3\]: have it return its penultimate"),
    ],
)
def test_what_is_no_model_is_named(role, model, message):
    options = {"student": mlp(1), "teacher": mlp(0)} | {role: model()}
    with pytest.raises(TypeError, match=message):
        fit(options.pop("student"), data(), metric="l2", batch_size=16, **options)


def test_a_result_in_place_of_its_student_is_named():
    result = fit(mlp(0), data(), epochs=1, batch_size=16)
    with pytest.raises(TypeError, match=r"got FitResult: give its \.student"):
        fit(mlp(1), data(), teacher=result, metric="l2", batch_size=16)


def test_a_module_may_have_a_dict_among_its_attributes():
    result = fit(WithDict(), data(), epochs=1, batch_size=16, eval_data=data())
    assert result.student.settings == {"depth": [1, 2]}
    np.testing.assert_equal(result.history[-1]["loss"], fit(
        mlp(0), data(), epochs=1, batch_size=16).history[-1]["loss"])  # fmt: skip


def test_lists_of_metrics_and_coefs_say_once_what_they_mean(caplog):
    _students._say_what_lists_mean.cache_clear()
    for _ in range(2):
        fit(mlp(1), data(), teacher=mlp(0), metric=["l2", "kd"], coef=[1.0, 0.1], epochs=1,
            batch_size=16)  # fmt: skip
    (record,) = caplog.records
    assert "as a population" in record.message and "losses.metric_sum" in record.message
