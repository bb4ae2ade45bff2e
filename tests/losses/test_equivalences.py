"""One metric is another, or tends to it: the equivalences that docs/which_metric.md lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import KINDS, draw
from draws import draw_logits, draw_maps, single
from reference import family, oracles

from kd2m_jax import losses
from kd2m_jax.losses._mmd import KERNELS

kinds = pytest.mark.parametrize("kind", KINDS)
kernels = pytest.mark.parametrize("kernel", KERNELS)


def logits_of(x, classes=5):
    return x @ np.random.default_rng(1).normal(size=(x.shape[1], classes)) / x.shape[1] ** 0.5


@pytest.mark.slow
@kinds
def test_solvers_meet_the_exact_cost(kind):
    x, y, _ = draw(kind, 40, 24)
    exact = losses.w2(*single(x, y), solver="exact")
    np.testing.assert_allclose(exact, oracles.w2(x, y), rtol=1e-4)
    # The entropic bias goes with epsilon; the proximal step, however large, leaves none.
    far, near, nearest = (
        losses.w2(*single(x, y), epsilon=e, solver="sinkhorn") - exact for e in (0.05, 0.01, 0.002)
    )
    # A student that nearly matches is solved by the dual start, without any bias, and so is one
    # that Sinkhorn gives up on (of power-law clouds, here).
    assert far > near >= nearest or kind == "nearly matched"
    np.testing.assert_allclose(nearest, 0, atol=2e-3 * exact)
    value = losses.w2(*single(x, y), epsilon=0.1, solver="ipot")
    np.testing.assert_allclose(value, exact, rtol=2e-3)


@pytest.mark.slow
def test_jw2_without_label_cost_is_w2():
    x, y, _ = draw("clustered", 40, 24)
    arrays = single(x, y, logits_of(x), logits_of(y))
    for options in ({"epsilon": 0.002, "solver": "sinkhorn"}, {"solver": "exact"}):
        value = losses.jw2(*arrays, beta=0.0, **options)
        np.testing.assert_allclose(value, losses.w2(*arrays[:2], **options), rtol=1e-5)


@kinds
@pytest.mark.parametrize("label_cost", ["cross_entropy", "kl", "sqeuclidean"])
def test_jw2_of_certain_outputs_is_cw2(kind, label_cost):
    """Where labels are predicted for sure and cost much, mass stays within the class."""
    x, y, labels = draw(kind, 40, 24, classes=4)  # ten samples a class
    logits = 20 * np.eye(4)[labels]
    expected = losses.cw2(*single(x, y, labels), solver="exact")
    arrays = single(x, y, logits, logits)
    value = losses.jw2(*arrays, beta=30.0, label_cost=label_cost, solver="ipot")
    np.testing.assert_allclose(value, expected, rtol=2e-3)
    if label_cost == "kl":  # Sinkhorn's epsilon is at least 1e-5 of the mean joint cost
        value = losses.jw2(*arrays, beta=30.0, label_cost=label_cost, solver="sinkhorn")
        np.testing.assert_allclose(value, expected, rtol=1e-2)


def test_classes_of_one_sample_leave_the_pairs():
    x, y, _ = draw("power-law", 24, 16)
    expected, alone = losses.l2(*single(x, y)), np.arange(24)
    for options in ({"solver": "ipot"}, {"debiased": True, "epsilon": 0.3}):
        value = losses.cw2(*single(x, y, alone), **options)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    value = losses.gaussian_cw2(*single(x, y, alone), covariance="diagonal")
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_kd_at_a_high_temperature_is_l2_between_centred_logits():
    h_s, h_t, _ = draw_logits()
    gap = (h_s - h_s.mean(1, keepdims=True)) - (h_t - h_t.mean(1, keepdims=True))
    k = h_s.shape[1]
    expected = (gap**2).sum(1).mean() / (2 * k)
    np.testing.assert_allclose(losses.kd(*single(h_s, h_t), temperature=300.0), expected, rtol=2e-2)
    with jax.enable_x64(True):
        value = losses.kd(jnp.asarray(h_s), jnp.asarray(h_t), temperature=1e5)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_linear_nst_is_linear_mmd_between_each_images_channels():
    maps_s, maps_t = draw_maps()
    per_image = [
        losses.mmd(*single(family.channels(s), family.channels(t)), kernel="linear")
        for s, t in zip(maps_s, maps_t, strict=True)
    ]
    value = losses.nst(*single(maps_s, maps_t), kernel="linear")
    np.testing.assert_allclose(value, np.mean(per_image), rtol=1e-5)


def test_polynomial_nst_matches_gram_matrices_between_positions():
    maps_s, maps_t = draw_maps()
    gaps = []
    for s, t in zip(maps_s, maps_t, strict=True):
        x, y = family.channels(s), family.channels(t)
        gaps.append(((x.T @ x / len(x) - y.T @ y / len(y)) ** 2).sum())
    np.testing.assert_allclose(losses.nst(*single(maps_s, maps_t)), np.mean(gaps), rtol=1e-4)


@kernels
def test_cmmd_of_one_class_is_mmd(kernel):
    x, y = single(*draw("clustered", 24, 8)[:2])
    one = jnp.full(24, 3)
    value = losses.cmmd(x, y, one, kernel=kernel)
    np.testing.assert_allclose(value, losses.mmd(x, y, kernel=kernel), rtol=1e-4)


def test_linear_cmmd_of_singletons_is_l2():
    x, y = single(*draw("clustered", 24, 8)[:2])
    value = losses.cmmd(x, y, jnp.arange(24), kernel="linear")
    np.testing.assert_allclose(value, losses.l2(x, y), rtol=1e-5)


def test_wkd_l_between_two_classes_is_the_target_term_alone():
    h_s, h_t, labels = draw_logits(k=2)
    value = losses.wkd_l(*single(h_s, h_t, labels), target_coef=2.0)
    log_s, p_t = jax.nn.log_softmax(h_s), jax.nn.softmax(h_t)
    rows = np.arange(len(labels))
    expected = -2 * (p_t[rows, labels] * log_s[rows, labels]).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
