"""The authors' weights, and what the package shows of itself."""

import pydoc

import numpy as np
import pytest

from kd2m_jax import losses


@pytest.mark.parametrize(
    ("name", "weights", "defaults"),
    [
        ("kd", (0.9, 0.1), {"temperature": 4}),
        ("nst", (25, 1), {"kernel": "polynomial", "degree": 2, "offset": 0}),
        ("wkd-l", (600, 1), {"temperature": 8, "target_coef": 1 / 600, "n_iters": 10}),
        ("wkd-f", (0.08, 1), {"mean_coef": 4, "grid": 1}),
    ],
)
def test_published_weights_and_defaults(name, weights, defaults):
    coef, task_coef = losses.published(name, 240 * 391)
    assert (coef(0) if callable(coef) else coef, task_coef) == pytest.approx(weights)
    found = losses.METRICS[name].function.__wrapped__.__kwdefaults__
    assert {option: found[option] for option in defaults} == defaults


@pytest.mark.parametrize(("name", "coef"), [("wkd_l:temperature=4", 600), ("wkd-f", 0.08)])
def test_the_decay_is_a_cosine_over_the_last_90_of_240_epochs(name, coef):
    epoch = 391
    schedule, _ = losses.published(name, 240 * epoch)
    at = [schedule(e * epoch) / coef for e in (0, 150, 172.5, 195, 217.5, 240)]
    low, high = (1 - 0.5**0.5) / 2, (1 + 0.5**0.5) / 2
    np.testing.assert_allclose(at, [1, 1, high, 0.5, low, 0], atol=1e-4)
    short, _ = losses.published(name, 1)
    assert short(0) == pytest.approx(coef)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("w2:solver=ipot", 9, "w2 has no published weights: kd, nst, wkd-l, wkd-f have"),
        ("kd+nst", 9, r"kd\+nst has no published weights"),
        ("kd:standardize=true", 9, "of kd are not those of standardized logits"),
        ("kdd", 9, "did you mean kd"),
        ("kd", 0, "total_steps must be an integer >= 1, got 0"),
    ],
)
def test_mistakes(name, steps, message):
    with pytest.raises(ValueError, match=message):
        losses.published(name, steps)


def test_pydoc_shows_every_public_name():
    text = pydoc.plain(pydoc.render_doc(losses))
    for info in losses.METRICS.values():
        assert f"{info.function.__name__}(" in text and info.description in text
    assert {"METRICS", "Metric", "get_metric", "published", "class_cost_matrix"} <= {
        *losses.__all__
    }
    assert [name for name in losses.__all__ if not hasattr(losses, name)] == []
