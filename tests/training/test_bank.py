"""A teacher that is gone: features of other images, or statistics of its classes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import (
    Bank,
    Outputs,
    class_statistics,
    ema_teacher,
    fit,
    from_nnx,
    losses,
    make_train_step,
    models,
)
from kd2m_jax.training._labels import balanced

N, D, K = 48, 6, 3
X, _, Y = draw("clustered", N, D, classes=K)
X, Y = X.astype(np.float32), Y.astype(np.int32)
OTHER, _, OTHER_Y = draw("clustered", 80, D, classes=K, seed=1)
SEEN = models.MLP((8, 5), K, in_features=D, rngs=nnx.Rngs(7))(OTHER.astype(np.float32))
BANK = Bank(SEEN.features, labels=OTHER_Y, logits=SEEN.logits, rows=None)
STATISTICS = class_statistics(SEEN.features, OTHER_Y)
UNPAIRED = [name for name, info in losses.METRICS.items() if not info.paired]


def mlp(seed=1, width=5):
    return models.MLP((8, width), K, in_features=D, rngs=nnx.Rngs(seed))


def run(data=(X, None), **options):
    options = {"epochs": 2, "batch_size": 16, "optimizer": optax.sgd(0.05)} | options
    return fit(mlp(), data, **{"metric": "w2", "task_coef": 0} | options)


def keys(step):
    """Return the key that a step draws with."""
    _, key = jax.random.split(jax.random.key(0))
    _, metric = jax.random.split(jax.random.fold_in(key, step))
    return metric


@pytest.mark.parametrize(
    ("rows", "drawn"), [pytest.param(None, 48, marks=pytest.mark.slow), (20, 20)]
)
def test_the_first_step_of_a_bank(rows, drawn):
    bank = Bank(SEEN.features, labels=OTHER_Y, rows=rows)
    options = {"batch_size": N, "max_steps": 1, "optimizer": optax.sgd(0.0)}
    for name in ("w2", "cw2"):
        got = run(teacher=bank, metric=name, **options).history[0]["distillation_loss"]
        student = mlp()(X)
        chosen = jax.random.randint(jax.random.fold_in(keys(0), 2**32 - 1), (drawn,), 0, 80)
        z, y = SEEN.features[chosen], OTHER_Y[chosen]
        if name == "w2":
            expected = losses.w2(student.features, z)
        else:  # its own prediction, balanced, is the class of a row without one
            own = balanced(student.logits, np.ones(N, bool), None).argmax(1)
            expected = losses.cw2(student.features, z, own, labels_t=y)
        np.testing.assert_allclose(got, expected, rtol=2e-3)


def test_known_classes_are_used():
    options = {"batch_size": N, "max_steps": 1, "optimizer": optax.sgd(0.0), "task_coef": 1.0}
    result = run((X, Y), teacher=STATISTICS, metric="gaussian-cw2", **options)
    expected = losses.gaussian_cw2(mlp()(X).features, STATISTICS, Y)
    np.testing.assert_allclose(result.history[0]["distillation_loss"], expected, rtol=1e-4)
    assert result.history[0]["train_accuracy"] >= 0


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "gaussian-kl" else pytest.mark.slow) for n in UNPAIRED],
)
@pytest.mark.parametrize("left", ["bank", "statistics"])
def test_every_metric_that_needs_no_pairs_learns(name, left):
    if left == "statistics" and "logits" in losses.get_metric(name).needs:
        pytest.skip("statistics have no logits")
    teacher = BANK if left == "bank" else STATISTICS
    coef = 0.02 if name == "mmd-polynomial" or name == "cmmd-polynomial" else 1.0
    options = {"metric": name, "coef": coef, "epochs": 15, "batch_size": N}
    # With labels, because what a student predicts of itself moves with it.
    options |= {"optimizer": optax.adam(0.02), "log_every": 1}
    history = run((X, Y), teacher=teacher, **options).history
    losses_of = [record["distillation_loss"] for record in history]
    assert np.isfinite(losses_of).all() and np.mean(losses_of[-3:]) < np.mean(losses_of[:3])


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [BANK, STATISTICS], ids=["bank", "statistics"])
def test_devices_draw_alike_and_a_killed_run_goes_on(teacher, tmp_path):
    options = {"teacher": teacher, "metric": "cmmd-linear", "epochs": 4, "log_every": 1}
    four = run(**options)
    one = run(**options, devices=jax.devices()[:1])
    for a, b in zip(four.history, one.history, strict=True):
        np.testing.assert_allclose(a["distillation_loss"], b["distillation_loss"], rtol=1e-4)
    run(**options | {"epochs": 2}, checkpoint_dir=tmp_path)
    again = run(**options, checkpoint_dir=tmp_path)
    chex.assert_trees_all_equal(again.state.params, four.state.params)
    moved = Bank(SEEN.features + 1, labels=OTHER_Y, rows=None)
    with pytest.raises(ValueError, match="made with other settings"):
        run(**options | {"teacher": moved}, checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_with_a_transfer_set():
    options = {"transfer": X, "transfer_batch_size": 16, "task_coef": 1.0, "batch_size": 8}
    result = run((X[:8], Y[:8]), teacher=BANK, metric="cw2", coef=0.1, **options)
    assert np.isfinite(result.history[-1]["loss"]) and result.history[-1]["distillation_loss"] > 0


def test_a_metric_of_ones_own():
    seen = []

    def metric(student, teacher, labels, *, labels_t=None, key=None):
        seen.append((len(student.features), len(teacher.features), labels_t))
        return jnp.sum((student.features.mean(0) - teacher.features.mean(0)) ** 2)

    result = run(teacher=Bank(SEEN.features, labels=OTHER_Y, rows=24), metric=metric)
    assert np.isfinite(result.history[-1]["loss"])
    assert {(n, m, t is not None) for n, m, t in seen} == {(16, 24, True)}

    def without(student, teacher, labels, *, key=None):
        return jnp.mean(student.features)

    with pytest.raises(ValueError, match="if it takes labels_t"):
        run(teacher=BANK, metric=without)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": BANK, "metric": "l2"}, "compares each example with itself.*need no pairs: w2"),
        ({"teacher": STATISTICS, "metric": "w2+kd"}, "compares each example with itself"),
        ({"teacher": STATISTICS, "metric": "jw2"}, "needs logits, which class statistics do not"),
        ({"teacher": STATISTICS, "metric": "w2@logits"}, "needs logits, which class statistics"),
        ({"teacher": Bank(SEEN.features), "metric": "cw2"}, "needs the bank's labels"),
        ({"teacher": Bank(SEEN.features), "metric": "jw2"}, "needs the bank's logits"),
        ({"teacher": BANK, "metric": None}, "and metric is missing"),
        (
            {"teacher": Bank(SEEN.features, labels=OTHER_Y + 90), "metric": "cw2"},
            "the bank's labels",
        ),
        (
            {"teacher": Bank(SEEN.features, labels=OTHER_Y - 5), "metric": "cw2"},
            "the bank's labels",
        ),
        (
            {"teacher": Bank(SEEN.features, labels=0 * OTHER_Y - 1), "metric": "cw2"},
            "bank's labels",
        ),
        (
            {"teacher": class_statistics(SEEN.features, OTHER_Y + 4), "metric": "gaussian-cw2"},
            "the statistics are of no class from 0 to 2",
        ),
        ({"teacher": BANK, "teacher_variables": ({}, {})}, "teacher_variables are those of a netw"),
        ({"teacher": BANK, "metric": "cw2", "unlabelled": "teacher"}, "for the same images"),
        (
            {"teacher": BANK, "transfer": (X, Outputs(X)), "transfer_batch_size": 16},
            "there is another teacher",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows must be at least 1, or None, got 0"),
        ({"labels": OTHER_Y[:4]}, ValueError, r"labels must have shape \[80\], got \[4\]"),
        ({"logits": SEEN.logits[:4]}, ValueError, "80 features and 4 logits"),
        ({"labels": OTHER_Y * 0.5}, TypeError, "labels must be integers"),
        ({"features": np.ones((3, 3), int)}, TypeError, "must hold floating-point"),
    ],
)
def test_a_wrong_bank_is_named(options, error, message):
    with pytest.raises(error, match=message):
        Bank(**{"features": SEEN.features} | options)


def test_a_metric_of_samples_refuses_statistics():
    out = Outputs(SEEN.features)
    with pytest.raises(ValueError, match="give a key to draw rows with"):
        losses.get_metric("w2")(out, STATISTICS)
    value = losses.get_metric("gaussian-w2")(out, STATISTICS)
    np.testing.assert_allclose(value, 0, atol=1e-4)


@pytest.mark.slow
def test_a_sum_takes_statistics_for_one_and_rows_for_the_other():
    options = {"batch_size": N, "max_steps": 1, "optimizer": optax.sgd(0.0)}
    record = run(teacher=STATISTICS, metric="gaussian-w2+w2", **options).history[0]
    z = mlp()(X).features
    np.testing.assert_allclose(
        record["distillation_loss/gaussian-w2"], losses.gaussian_w2(z, STATISTICS), rtol=1e-4
    )
    assert record["distillation_loss/w2"] > 0
    value, _ = losses.distillation_loss(
        mlp()(X), STATISTICS, Y, metric="gaussian-w2", coef=1.0, task_coef=0.0
    )
    np.testing.assert_allclose(value, losses.gaussian_w2(z, STATISTICS), rtol=1e-6)


@pytest.mark.parametrize(
    "teacher",
    [BANK, STATISTICS, SEEN, ema_teacher()],
    ids=["bank", "statistics", "outputs", "average"],
)
def test_steps_say_that_these_are_teachers_of_fit(teacher):
    with pytest.raises(TypeError, match="are teachers of fit"):
        make_train_step(from_nnx(mlp()), teacher, optax.sgd(0.1), metric="w2")
