"""Right and wrong answers are told from each other."""

import inspect

import numpy as np
import pytest

from experiments.bench import (
    answers,
    measure,
)
from kd2m_jax import Outputs, losses


def _as_outputs(x, y, seed=0):
    logits = np.random.default_rng(seed).normal(size=(2, len(x), 3)).astype(np.float32)
    return Outputs(x, logits[0]), Outputs(y, logits[1])


@pytest.mark.parametrize("name", ["w2", "cw2", "jw2", "lohit", "gaussian-w2", "gaussian-cw2",
                                  "gaussian-kl", "gaussian-ckl"])  # fmt: skip
def test_answers_tell_right_from_wrong(monkeypatch, name):
    x, y, labels = measure.clouds("clustered", 24, 6, classes=3)
    outputs = _as_outputs(x, y)
    found = answers.answer(name, *outputs, labels)
    assert found["answer"] == "right" and found["off by"].endswith("%")
    assert ("iterations" in found) == ("gaussian" not in name)
    loss = losses.METRICS[name].function

    def dearer(*args, **options):
        out = loss(*args, **options)
        if isinstance(out, tuple):
            return 1.02 * out[0], out[1]
        return out if name == "jw2" else 1.02 * out  # the exact value that jw2 is judged by

    dearer.__signature__ = inspect.signature(loss)
    wrong = losses.METRICS[name]._replace(function=dearer)
    monkeypatch.setitem(losses.METRICS, name, wrong)
    assert answers.answer(name, *outputs, labels)["answer"] == "WRONG"


def test_an_answer_that_did_not_converge_is_wrong(monkeypatch):
    x, y, labels = measure.clouds("clustered", 24, 6, classes=3)
    monkeypatch.setattr(answers, "EXACT_UP_TO", 8)  # so that convergence is all there is
    assert answers.answer("w2", *_as_outputs(x, y), labels)["answer"] == "right"

    def stuck(metric, *outputs):
        value, info = losses.w2(x, y, has_aux=True)
        return value, info._replace(converged=False)

    monkeypatch.setattr(answers, "metric_with_info", stuck)
    assert answers.answer("w2", *_as_outputs(x, y), labels)["answer"] == "WRONG"
    assert answers.answer("l2", *_as_outputs(x, y), labels) == {}
