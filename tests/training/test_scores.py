"""Scores of the test set: by name, against their definitions, and of one's own."""

import chex
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import Outputs, ema_teacher, fit, models

N, D, K = 48, 6, 7
X, _, Y = draw("clustered", N, D, classes=K)
X, Y = X.astype(np.float32), Y.astype(np.int32)


def mlp(seed):
    return models.MLP((8, 5), K, in_features=D, rngs=nnx.Rngs(seed))


def run(**options):
    options = {"epochs": 2, "batch_size": 16, "optimizer": optax.sgd(0.01)} | options
    return fit(mlp(1), (X, Y), **options)


def calibration_error(logits, labels):
    """Row by row, after Guo et al. 2017, eq. 5."""
    p = np.exp(np.float64(logits) - np.float64(logits).max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    bins = [[] for _ in range(15)]
    for row, label in zip(p, labels, strict=True):
        bins[min(int(row.max() * 15), 14)].append((row.max(), row.argmax() == label))
    return sum(
        len(b) / len(labels) * abs(np.mean([r for _, r in b]) - np.mean([c for c, _ in b]))
        for b in bins
        if b
    )


@pytest.mark.slow
def test_named_scores_against_their_definitions():
    teacher = mlp(0)
    labels = np.where(np.arange(N) % 8 == 0, -1, Y)
    known = labels >= 0
    found = run(
        teacher=teacher,
        metric="kd",
        eval_data=(X, labels),
        metrics=["top-5", "ece", "agreement"],
    )
    logits = np.asarray(found.student(X).logits)
    last = found.history[-1]
    order = np.argsort(-logits, axis=1)[:, :5]
    top5 = np.mean([label in row for row, label in zip(order[known], labels[known], strict=True)])
    assert last["test_top_5"] == pytest.approx(top5) and 0 < top5 < 1
    assert last["test_ece"] == pytest.approx(
        calibration_error(logits[known], labels[known]), rel=1e-4
    )
    theirs = np.asarray(teacher(X).logits).argmax(1)
    assert last["test_agreement"] == pytest.approx(np.mean(logits.argmax(1) == theirs))
    accuracy = np.mean((logits.argmax(1) == labels)[known])
    assert last["test_accuracy"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_agreement_with_outputs_that_eval_data_brings():
    out = mlp(0)(X)
    stored = Outputs(out.features, out.logits)
    options = {"teacher": stored, "metric": "kd", "metrics": ["agreement"]}
    found = run(**options, eval_data=(X, Y, stored))
    whole = run(**options | {"teacher": mlp(0)}, eval_data=(X, Y))
    for one, other in zip(found.history, whole.history, strict=True):
        assert one["test_agreement"] == other["test_agreement"]
    batches = [{"x": X[:30], "y": Y[:30], "teacher": {"logits": stored.logits[:30]}}]
    streamed = run(**options, eval_data=batches).history[-1]["test_agreement"]
    same = np.asarray(found.student(X[:30]).logits).argmax(1) == stored.logits[:30].argmax(1)
    assert streamed == pytest.approx(float(np.mean(same)))


@pytest.mark.slow
def test_a_score_of_ones_own_sees_every_row_once():
    """Filling of the last batch and of the devices stays out of it; the order is kept."""
    seen = []

    def noting(out, labels):
        seen.append((out, labels))
        return 7

    for data in ((X[:45], Y[:45]), [(X[:20], Y[:20]), (X[20:45], Y[20:45])]):
        found = run(eval_data=data, metrics=[noting], epochs=1)
        assert found.history[-1]["test_noting"] == 7
        out, labels = seen[-1]
        np.testing.assert_array_equal(labels, Y[:45])
        expected = found.student(X[:45])
        chex.assert_trees_all_close((out.features, out.logits), expected[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_of_a_population_each_student_has_its_scores():
    teacher = mlp(0)
    options = {"teacher": teacher, "eval_data": (X, Y), "metrics": ["agreement"], "coef": 0.1}
    both = run(metric=["kd", "l2"], **options)
    for metric, found in zip(["kd", "l2"], both, strict=True):
        alone = run(metric=metric, **options)
        assert found.history[-1]["test_agreement"] == alone.history[-1]["test_agreement"]


def test_what_is_no_score_is_named():
    taught = {"teacher": mlp(0), "metric": "kd", "eval_data": (X, Y)}
    for metrics, options, message in (
        (["top-3"], {}, "metrics are functions .* accuracy, top-5, ece, agreement: got 'top-3'"),
        (["ece"], {"eval_data": None}, "metrics are scores of eval_data, and there is none"),
        ([lambda out, labels: 1], {}, "a function among metrics needs a name"),
        (["ece", "ece"], {}, "there are two scores test_ece"),
        (["accuracy"], {}, "there are two scores test_accuracy"),
        (["agreement"], {"teacher": ema_teacher()}, "agreement compares with the teacher's logits"),
        (
            ["agreement"],
            {"teacher": None, "metric": None},
            "agreement compares with the teacher's logits",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(**taught | {"metrics": metrics} | options)


@pytest.mark.slow
def test_a_score_that_is_no_number_is_named():
    def rows(out, labels):
        return labels

    with pytest.raises(ValueError, match="metrics: test_rows must be one number, got shape"):
        run(eval_data=(X, Y), metrics=[rows])
