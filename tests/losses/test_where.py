"""``where`` and labels of -1: a row that does not count is as if it were not there."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import compiled
from walk import VARIANTS, batch, label, walked

from kd2m_jax import Outputs, losses

KEY = jax.random.key(0)
N, KEPT = 40, 24
KEEP = np.random.default_rng(1).permutation(N) < KEPT
# One of each kind; the others are walked with the slow tests.
FAST = ("w2", "cw2", "gaussian-kl")
few = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*v, id=label(*v), marks=() if v[0] in FAST and not v[1] else pytest.mark.slow)
        for v in VARIANTS
    ],
)
CONDITIONAL = [v for v in VARIANTS if "labels" in losses.METRICS[v[0]].needs]


def tolerance(name, options):
    # Iterative solvers stop within a tolerance: their last digits follow how rows are grouped.
    iterative = options.get("solver") == "sinkhorn" or options.get("debiased")
    return 2e-3 if iterative or "ipot" in losses.METRICS[name].options.values() else 2e-5


@functools.cache
def compiled_with_where(metric):
    """Value and gradients of both networks: one program for everything that may count."""

    def value(networks, labels, where):
        return metric(*networks, labels, where=where, key=KEY)

    return jax.jit(jax.value_and_grad(value))


def of_those_that_count(*arrays):
    return jax.tree.map(lambda a: np.asarray(a)[KEEP], arrays)


def spoilt(*arrays):
    """Return the arrays with NaN in the rows that do not count."""

    def spoil(a):
        return np.where(KEEP.reshape(-1, *[1] * (a.ndim - 1)), a, np.float32(np.nan))

    return jax.tree.map(spoil, arrays)


def assert_same(got, expected, rtol):
    (value, gradients), (right, of_kept) = got, expected
    np.testing.assert_allclose(value, right, rtol=rtol)
    for g, e in zip(jax.tree.leaves(gradients), jax.tree.leaves(of_kept), strict=True):
        g, e = np.asarray(g), np.asarray(e)
        assert not np.any(g[~KEEP])
        np.testing.assert_allclose(g[KEEP], e, rtol=0, atol=rtol * np.abs(e).max() + 1e-12)


@few
def test_rows_left_out_are_not_there(name, options):
    metric, (student, teacher, labels) = losses.get_metric(name, **options), batch(N)
    *networks, their_labels = of_those_that_count(student, teacher, labels)
    got = compiled_with_where(metric)(spoilt(student, teacher), labels, KEEP)
    expected = compiled(metric)(tuple(networks), their_labels)
    assert_same(got, expected, tolerance(name, options))


@pytest.mark.parametrize(("name", "options"), walked(CONDITIONAL))
def test_rows_without_a_class_are_not_there(name, options):
    metric, (student, teacher, labels) = losses.get_metric(name, **options), batch(N)
    *networks, their_labels = of_those_that_count(student, teacher, labels)
    got = compiled(metric)(spoilt(student, teacher), np.where(KEEP, labels, -1))
    expected = compiled(metric)(tuple(networks), their_labels)
    assert_same(got, expected, tolerance(name, options))
    wrong = np.where(np.arange(N) == 0, -2, labels)
    assert np.isnan(compiled(metric)((student, teacher), wrong)[0])


@few
def test_nothing_left_is_zero(name, options):
    metric, (student, teacher, labels) = losses.get_metric(name, **options), batch(N)
    value, gradients = compiled_with_where(metric)((student, teacher), labels, np.zeros(N, bool))
    assert value == 0
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


def test_no_class_present_is_zero():
    student, teacher, labels = batch()
    value, gradients = compiled(losses.get_metric("cw2"))((student, teacher), 0 * labels - 1)
    assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32])
def test_a_large_unsigned_label_is_a_class(dtype):
    student, teacher, labels = batch()
    top = np.asarray(jnp.where(labels == 3, np.iinfo(dtype).max % 2**31, labels)).astype(dtype)
    assert losses.cw2(student.features, teacher.features, top) == losses.cw2(
        student.features, teacher.features, labels
    )


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (np.ones(24), TypeError, "where must hold True or False, got float"),
        (np.ones(23, bool), ValueError, r"where must have shape \[24\], got \[23\]"),
        (np.ones((24, 1), bool), ValueError, r"where must have shape \[24\], got \[24, 1\]"),
    ],
)
def test_mistakes_are_named(where, error, message):
    student, teacher, _ = batch()
    with pytest.raises(error, match=message):
        losses.w2(student.features, teacher.features, where=where)


def test_unequal_sides_are_refused():
    student, teacher, _ = batch()
    with pytest.raises(ValueError, match="as many rows of each, got 24 of the student and 20"):
        losses.gaussian_w2(student.features, teacher.features[:20], where=np.ones(24, bool))


@pytest.mark.slow
@pytest.mark.parametrize("bandwidth", ["mean", "median", 2.0])
def test_bandwidths_of_the_rows_that_count(bandwidth):
    student, teacher, _ = batch(N)
    s, t = student.features, teacher.features
    got = losses.mmd(s.at[~KEEP].set(jnp.nan), t, bandwidth=bandwidth, where=jnp.asarray(KEEP))
    np.testing.assert_allclose(got, losses.mmd(s[KEEP], t[KEEP], bandwidth=bandwidth), rtol=1e-5)


@pytest.mark.slow
def test_the_plan_of_rows_left_out_is_empty():
    student, teacher, _ = batch(N)
    for solver in ("exact", "sinkhorn", "ipot"):
        _, info = losses.w2(
            student.features, teacher.features, solver=solver, where=jnp.asarray(KEEP), has_aux=True
        )
        assert not np.any(info.coupling[~KEEP]) and not np.any(info.coupling[:, ~KEEP])
        np.testing.assert_allclose(info.coupling.sum(), 1, rtol=1e-5)


@pytest.mark.slow
def test_under_vmap():
    student, teacher, labels = batch(N)
    rows = np.stack([KEEP, ~KEEP])
    call = lambda where: losses.cw2(  # noqa: E731
        student.features, teacher.features, labels, where=where
    )
    np.testing.assert_allclose(jax.vmap(call)(rows), [call(where) for where in rows], rtol=1e-6)


def test_every_loss_takes_it():
    for name, info in losses.METRICS.items():
        assert inspect.signature(info.function).parameters["where"].default is None, name
        assert "where" not in dict(losses.get_metric(name).options)


def test_cross_entropy_is_the_mean_over_rows_with_a_label():
    student, _, labels = batch(N)
    some = jnp.where(KEEP, labels, -1)
    of_all = lambda labels, out: losses.distillation_loss(  # noqa: E731
        out, out, labels, metric=None, coef=0.0
    )[0]
    expected = of_all(labels[KEEP], jax.tree.map(lambda a: a[KEEP], student))
    np.testing.assert_allclose(of_all(some, student), expected, rtol=1e-6)
    assert of_all(jnp.full(N, -1), student) == 0
    assert np.isnan(of_all(labels.at[0].set(-2), student))


def test_labels_that_are_distributions():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    shares = rng.dirichlet(np.ones(4), size=6)
    out = Outputs(logits, logits)
    loss, _ = losses.distillation_loss(out, out, shares, metric=None, coef=0.0)
    log_p = np.asarray(logits, np.float64)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    np.testing.assert_allclose(loss, -(shares * log_p).sum(1).mean(), rtol=1e-6)
    # A conditional metric takes the most probable class.
    other = Outputs(logits + rng.normal(size=(6, 4)), logits)
    _, soft = losses.distillation_loss(out, other, shares, metric="cw2", coef=1.0)
    _, hard = losses.distillation_loss(out, other, shares.argmax(1), metric="cw2", coef=1.0)
    assert soft.distillation == hard.distillation
    with pytest.raises(TypeError, match="labels must be integers"):
        losses.cw2(logits, logits, shares)
    with pytest.raises(ValueError, match=r"must have shape \[6, 4\], got \[6, 3\]"):
        losses.distillation_loss(out, out, shares[:, :3], metric=None, coef=0.0)
