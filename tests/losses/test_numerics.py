"""What must hold in float32 for every metric of the catalogue, under jit, value and gradients."""

import contextlib
import faulthandler
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import (
    LAWS,
    SHAPES,
    check_finite,
    collapsed,
    dead,
    first_class_scaled,
    hard_cases,
    is_finite,
    largest,
    law,
    parameters_of,
    run,
    scaled,
    shaped,
    turned,
)
from walk import VARIANTS, batch, used, variants, walked

from kd2m_jax import losses


@shaped
def test_value_and_gradients_are_finite(name, options, shape):
    check_finite(name, options, hard_cases(*SHAPES[shape]))


@variants
def test_one_sample_is_finite(name, options):
    student, teacher, labels = batch(1)
    zeros = jax.tree.map(jnp.zeros_like, student)
    cases = {
        "two points": (student, teacher, labels),
        "the same point": (student, student, labels),
        "at 0": (zeros, zeros, labels),
        "times 1e4": (scaled(student, 1e4), scaled(teacher, 1e4), labels),
    }
    check_finite(name, options, cases)


@pytest.mark.parametrize("name", ["jw2", "cw2", "sw2", "gaussian-kl", "wkd-f"])
def test_distillation_loss_with_a_huge_lambda(name):
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(networks, labels, coef):
        key = jax.random.key(0)
        return losses.distillation_loss(*networks, labels, metric=name, coef=coef, key=key)

    step = jax.jit(loss)
    for case, (student, teacher, labels) in hard_cases().items():
        (total, terms), (grad_s, grad_t) = step((student, teacher), labels, 1e6)
        assert is_finite((total, terms, grad_s)), case
        assert largest(grad_t) == 0, case  # the teacher is frozen, to the bit
        np.testing.assert_allclose(total, terms.task + 1e6 * terms.distillation, rtol=1e-5)


def typical(metric, network, labels):
    """Value and gradients between a cloud and one of its points: as large as the cloud is wide.

    What rounding is measured by: float32 keeps 1e-7 of each inner product, and sums over 24
    samples stay below 1e-5 of this. Gradients lose more, to the condition of the covariances.
    One point has no gradient in `cka`: there the samples change places.
    """
    other = turned(network) if metric.name == "cka" else collapsed(network)
    return run(metric, other, network, labels)


@shaped
def test_equal_networks_are_at_distance_zero(name, options, shape):
    metric = losses.get_metric(name, **options)
    student, _, labels = batch(*SHAPES[shape])
    changes = {
        "as it is": lambda o: o,
        "times 1e-4": lambda o: scaled(o, 1e-4),
        "times 1e4": lambda o: scaled(o, 1e4),
        "dead features": dead,
        "one class 1e-3 of the others": lambda o: first_class_scaled(o, labels),
    }
    for case, change in changes.items():
        network = change(student)
        value, grads = typical(metric, network, labels)
        at_equality, grads_there = run(metric, network, network, labels)
        assert at_equality >= -1e-5 * value, case
        if law(metric).zero:
            assert at_equality <= 1e-5 * value, case
            assert largest(grads_there) <= 1e-3 * largest(grads), case


@variants
def test_nearly_equal_networks_are_not_at_a_negative_distance(name, options):
    metric = losses.get_metric(name, **options)
    student, teacher, labels = batch()
    value, _ = typical(metric, student, labels)
    for step in (1e-1, 1e-2, 1e-3, 1e-4):
        near = jax.tree.map(lambda a, b, step=step: a + step * (b - a), student, teacher)
        assert run(metric, near, student, labels)[0] >= -1e-5 * value


@variants
def test_student_and_teacher_change_places(name, options):
    metric = losses.get_metric(name, **options)
    student, teacher, labels = batch()
    if law(metric).symmetric:
        value, (grad_s, grad_t) = run(metric, student, teacher, labels)
        swapped, (other_t, other_s) = run(metric, teacher, student, labels)
        # A Gaussian W2 is a difference of terms as large as the clouds, so it is to their scale,
        # not to its own, that float32 is exact.
        scale = sum(float(jnp.sum(o.features**2)) for o in (student, teacher)) / len(labels)
        np.testing.assert_allclose(swapped, value, rtol=1e-5, atol=1e-6 * scale)
        assert_close((grad_s, grad_t), (other_s, other_t), rtol=1e-3)
    elif "direction" in parameters_of(metric) and not options.get("direction"):
        # The other direction of a divergence is the same one with its arguments exchanged.
        other = losses.get_metric(name, **{**options, "direction": "teacher_student"})
        swapped, _ = run(other, teacher, student, labels)
        np.testing.assert_allclose(swapped, run(metric, student, teacher, labels)[0], rtol=1e-5)
    else:
        pytest.skip("its formula does not promise that")


def assert_close(tree, expected, *, rtol):
    """Leaf by leaf, entries below 1e-4 of a leaf's largest being rounding.

    A plan at epsilon = 1% multiplies the costs' 1e-6 by 100; a direction 1e-3 as wide as the
    others is 1e-6 in a covariance, ten ulps.
    """

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-4 * np.abs(b).max())

    jax.tree.map(close, tree, expected)


@shaped
def test_order_of_the_batch_does_not_matter(name, options, shape):
    metric = losses.get_metric(name, **options)
    student, teacher, labels = batch(*SHAPES[shape])
    order = np.random.default_rng(3).permutation(len(labels))

    def both(x, y):
        value, grads = run(metric, x, y, labels)
        again, grads_again = run(metric, *jax.tree.map(lambda a: a[order], (x, y, labels)))
        # Sinkhorn stops at a marginal error of 5e-4, and sums in another order may take it
        # there five iterations later; the rest repeats to rounding.
        np.testing.assert_allclose(again, value, rtol=1e-4)
        return grads_again, jax.tree.map(lambda g: g[order], grads)

    assert_close(*both(student, teacher), rtol=1e-2)
    again, expected = both(*(first_class_scaled(o, labels) for o in (student, teacher)))
    if name.startswith("gaussian"):  # Transport pairs points that near as rounding falls.
        assert_close(again, expected, rtol=1e-2)


# A rotation is one for all classes.
TIGHT = [v for v in VARIANTS if v[0] in ("cw2", "gaussian-cw2") and "rotation" not in v[1]]


@pytest.mark.parametrize(("name", "options"), walked(TIGHT))
@pytest.mark.parametrize("c", [1e-1, 1e-3])
def test_a_tight_class_keeps_its_own_gradient(name, options, c):
    """Classes do not interact, so one that shrinks by c has c times the gradient it had."""
    metric = losses.get_metric(name, **options)
    student, teacher, labels = batch()
    _, (grads, _) = run(metric, student, teacher, labels)
    tight = [first_class_scaled(o, labels, c) for o in (student, teacher)]
    _, (grads_again, _) = run(metric, *tight, labels)
    own = np.asarray(labels == labels[0])
    # Centred by its own mean, such a class loses 1e-7 / c to rounding, in what is c times smaller.
    expected = c * grads.features[own]
    np.testing.assert_allclose(
        grads_again.features[own], expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max()
    )
    np.testing.assert_allclose(
        grads_again.features[~own], grads.features[~own], rtol=1e-2, atol=1e-3 * largest(grads)
    )


@pytest.mark.parametrize(
    "name", ["w2", "jw2", "sw2", "gaussian-w2", "gaussian-kl", "mmd-rbf", "mmd-energy"]
)
def test_marginal_metrics_do_not_see_who_is_paired_with_whom(name):
    metric = losses.get_metric(name)
    student, teacher, labels = batch()
    order = np.random.default_rng(3).permutation(len(labels))
    value, (grad_s, grad_t) = run(metric, student, teacher, labels)
    shuffled = jax.tree.map(lambda a: a[order], student)
    again, (grad_s_again, grad_t_again) = run(metric, shuffled, teacher, labels)
    np.testing.assert_allclose(again, value, rtol=1e-4)
    expected = jax.tree.map(lambda g: g[order], grad_s)
    assert_close((grad_s_again, grad_t_again), (expected, grad_t), rtol=1e-2)


@variants
def test_translation_of_both_clouds(name, options):
    metric = losses.get_metric(name, **options)
    if "features" not in used(metric) or not law(metric).moves:
        pytest.skip("its formula does not promise that")
    student, teacher, labels = batch()
    offset = 10 * float(student.features.std())
    moved = [o._replace(features=o.features + offset) for o in (student, teacher)]
    value, grads = run(metric, student, teacher, labels)
    again, grads_again = run(metric, *moved, labels)
    # The offset costs each feature 10 ulps, 1e-6 of the clouds' size.
    np.testing.assert_allclose(again, value, rtol=1e-4)
    assert_close(grads_again, grads, rtol=1e-2)


@variants
def test_scale_of_both_clouds(name, options):
    metric = losses.get_metric(name, **options)
    power = law(metric).power
    if power is None:
        pytest.skip("its formula does not promise that")
    student, teacher, labels = batch()
    value, (grads, _) = run(metric, student, teacher, labels)
    for c in (1e-4, 1e4):
        again, (grads_again, _) = run(metric, scaled(student, c), scaled(teacher, c), labels)
        np.testing.assert_allclose(again, c**power * value, rtol=1e-3)
        for leaf, expected in zip(*map(jax.tree.leaves, (grads_again, grads)), strict=True):
            expected = c ** (power - 1) * expected
            np.testing.assert_allclose(
                leaf, expected, rtol=1e-2, atol=1e-4 * np.abs(expected).max()
            )


@contextlib.contextmanager
def must_end(seconds):
    """End the test run with a traceback if a solver spins: nothing can interrupt XLA."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@variants
def test_one_bad_number_makes_the_value_non_finite(name, options):
    metric = losses.get_metric(name, **options)
    *networks, labels = batch()
    hidden = []
    with must_end(300):
        for which in (0, 1):
            for field in used(metric):
                for bad in (np.nan, np.inf, -np.inf):
                    broken = list(networks)
                    spoilt = jax.tree.map(
                        lambda a, bad=bad: a.at[5, ..., 2].set(bad), getattr(networks[which], field)
                    )
                    broken[which] = networks[which]._replace(**{field: spoilt})
                    if np.isfinite(run(metric, *broken, labels)[0]):
                        hidden.append((which, field, bad))
    assert hidden == []


@pytest.mark.slow
@variants
def test_float64_stays_float64(name, options):
    metric = losses.get_metric(name, **options)
    *networks, labels = batch()
    value, _ = run(metric, *networks, labels)
    with jax.enable_x64(True):
        student, teacher = jax.tree.map(lambda a: a.astype(jnp.float64), networks)
        call = functools.partial(metric, labels=labels, key=jax.random.key(0))
        double = call(student, teacher)
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, value, rtol=1e-3)
        if law(metric).zero:  # no step on the way was taken in float32
            assert abs(call(student, student)) <= 1e-12 * double


def test_every_metric_has_its_laws():
    assert LAWS.keys() == losses.METRICS.keys()
