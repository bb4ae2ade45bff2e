"""``labels_t``: classes of a teacher's rows that are not the student's examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.oracles import gaussian_kl, gaussian_w2, w2

from kd2m_jax import losses

# Student: classes 0, 1, 2, 5 and rows without one. Teacher: 0, 1, 2, 7, other numbers of each.
RNG = np.random.default_rng(0)
Y_S = np.array([0] * 7 + [1] * 4 + [2] * 1 + [5] * 2 + [-1] * 3)
Y_T = np.array([2] * 3 + [0] * 5 + [7] * 4 + [1] * 9)
CENTRES = 3 * RNG.normal(size=(8, 5))
Z_S = CENTRES[Y_S] + RNG.normal(size=(len(Y_S), 5))
Z_T = CENTRES[Y_T] + 0.7 * RNG.normal(size=(len(Y_T), 5)) + 0.3
SHARED = (0, 1, 2)

LOSSES = {
    "cw2": lambda *a, **o: losses.cw2(*a, solver="ipot", **o),
    "cw2-sinkhorn": losses.cw2,
    "gaussian-cw2": losses.gaussian_cw2,
    "gaussian-cw2-rotation": lambda *a, **o: losses.gaussian_cw2(*a, rotation=True, **o),
    "gaussian-cw2-diagonal": lambda *a, **o: losses.gaussian_cw2(*a, covariance="diagonal", **o),
    "gaussian-ckl": losses.gaussian_ckl,
    "gaussian-ckl-reversed": lambda *a, **o: losses.gaussian_ckl(
        *a, direction="teacher_student", **o
    ),
    "gaussian-ckl-diagonal": lambda *a, **o: losses.gaussian_ckl(*a, covariance="diagonal", **o),
    **{
        f"cmmd-{kernel}": lambda *a, kernel=kernel, **o: losses.cmmd(*a, kernel=kernel, **o)
        for kernel in ("linear", "polynomial", "rbf", "energy")
    },
}
TOLERANCES = {"cw2": 2e-3, "cw2-sinkhorn": 2e-2}
# One of each kind; the others are walked with the slow tests.
FAST = ("cw2", "gaussian-cw2", "cmmd-energy")
every = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LOSSES]
)


def single(*arrays):
    return (jnp.asarray(a, jnp.float32) for a in arrays)


def of(name, z_s, z_t, labels, labels_t):
    """Value and both gradients."""
    call = lambda z_s, z_t: LOSSES[name](z_s, z_t, labels, labels_t=labels_t)  # noqa: E731
    return jax.value_and_grad(call, argnums=(0, 1))(*single(z_s, z_t))


def by_class(distance):
    """Return the mean over the classes that both have, in float64."""
    return np.mean([distance(Z_S[c == Y_S], Z_T[c == Y_T]) for c in SHARED])


def ridge(shrinkage=0.1):
    there_s, there_t = Z_S[np.isin(Y_S, SHARED)], Z_T[np.isin(Y_T, SHARED)]
    return shrinkage * (there_s.var(0).mean() + there_t.var(0).mean()) / 2


@every
def test_the_value_is_the_mean_over_the_classes_that_both_have(name):
    expected = {
        "cw2": lambda: by_class(w2),
        "cw2-sinkhorn": lambda: by_class(w2),
        "gaussian-cw2": lambda: by_class(gaussian_w2),
        "gaussian-cw2-diagonal": lambda: by_class(functools.partial(gaussian_w2, kind="diagonal")),
        "gaussian-ckl": lambda: by_class(lambda x, y: gaussian_kl(x, y, s=ridge())),
        "gaussian-ckl-reversed": lambda: by_class(lambda x, y: gaussian_kl(y, x, s=ridge())),
    }
    value, gradients = of(name, Z_S, Z_T, Y_S, Y_T)
    if name in expected:
        np.testing.assert_allclose(value, expected[name](), rtol=TOLERANCES.get(name, 1e-3))
    elif name.startswith("cmmd") and name != "cmmd-rbf":  # whose bandwidth is that of all
        kernel = name.removeprefix("cmmd-")
        parts = [losses.mmd(*single(Z_S[c == Y_S], Z_T[c == Y_T]), kernel=kernel) for c in SHARED]
        np.testing.assert_allclose(value, np.mean(parts), rtol=1e-4)
    # What has no class there has no gradient.
    for gradient, labels in zip(gradients, (Y_S, Y_T), strict=True):
        assert np.isfinite(gradient).all() and not np.any(gradient[~np.isin(labels, SHARED)])
        assert np.any(gradient[np.isin(labels, SHARED)])


@pytest.mark.slow
@every
def test_other_classes_and_the_order_of_rows_count_for_nothing(name):
    value, gradients = of(name, Z_S, Z_T, Y_S, Y_T)
    there_s, there_t = (np.flatnonzero(np.isin(y, SHARED)) for y in (Y_S, Y_T))
    order = np.random.default_rng(1).permutation(there_t)
    other, theirs = of(name, Z_S[there_s], Z_T[order], Y_S[there_s], Y_T[order])
    rtol = TOLERANCES.get(name, 1e-4) if name != "cw2-sinkhorn" else 2e-3
    np.testing.assert_allclose(other, value, rtol=rtol)
    for got, whole in ((theirs[0], gradients[0][there_s]), (theirs[1], gradients[1][order])):
        np.testing.assert_allclose(got, whole, rtol=0, atol=5 * rtol * np.abs(whole).max())


@pytest.mark.slow
@every
def test_with_the_same_examples_it_is_the_paired_loss(name):
    rows = np.arange(len(Y_S))
    z_t = Z_S + 0.5 * np.random.default_rng(2).normal(size=Z_S.shape)
    z_s, z_t = single(Z_S, z_t)
    apart = LOSSES[name](z_s, z_t, Y_S, labels_t=Y_S[rows])
    paired = LOSSES[name](z_s, z_t, Y_S)
    np.testing.assert_allclose(apart, paired, rtol=TOLERANCES.get(name, 1e-3))


@every
def test_without_a_class_in_common_it_is_zero(name):
    value, gradients = of(name, Z_S, Z_T, np.full(len(Y_S), 3), Y_T)
    assert value == 0 and not any(np.any(g) for g in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "cw2-sinkhorn"])
def test_a_step_against_the_gradient_lowers_it(name):
    value, (gradient, _) = of(name, Z_S, Z_T, Y_S, Y_T)
    size = 0.05 * value / (gradient**2).sum()
    lower, _ = of(name, Z_S - size * gradient, Z_T, Y_S, Y_T)
    np.testing.assert_allclose(value - lower, 0.05 * value, rtol=0.25)


@pytest.mark.slow
def test_the_plan_of_unequal_sides():
    value, info = losses.cw2(*single(Z_S, Z_T), Y_S, labels_t=Y_T, has_aux=True)
    assert info.coupling.shape == (len(Y_S), len(Y_T)) and info.converged
    np.testing.assert_allclose(info.coupling.sum(), 1, rtol=1e-3)
    assert not np.any(info.coupling[Y_S[:, None] != Y_T[None, :]])
    debiased = losses.cw2(*single(Z_S, Z_T), Y_S, labels_t=Y_T, debiased=True)
    assert 0.9 * value < debiased < value
    same = losses.cw2(*single(Z_S, Z_S), Y_S, labels_t=Y_S, debiased=True)
    np.testing.assert_allclose(same, 0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels_t": Y_T[:3]}, ValueError, r"labels_t must have shape \[21\], got \[3\]"),
        ({"labels_t": Y_T * 0.5}, TypeError, "labels must be integers"),
        ({"labels_t": Y_T, "where": np.ones(17, bool)}, ValueError, "give the rows the label -1"),
        ({"labels_t": Y_T, "solver": "exact"}, ValueError, "which labels_t does not allow"),
    ],
)
def test_mistakes_are_named(options, error, message):
    with pytest.raises(error, match=message):
        losses.cw2(*single(Z_S, Z_T), Y_S, **options)
    assert np.isnan(losses.gaussian_cw2(*single(Z_S, Z_T), Y_S, labels_t=Y_T - 3))
