"""cw2 and gaussian_cw2 after a rotation of the teacher's space: oracle, invariance, gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check, compiled
from clouds import KINDS, draw
from draws import single
from reference import oracles

from kd2m_jax import losses
from kd2m_jax.losses._rotation import completed

slow = pytest.mark.slow
KINDS_OF_COUPLING = {
    "cw2": (losses.cw2, oracles.w2, (oracles.transported, 1e-3)),
    "gaussian-cw2": (losses.gaussian_cw2, oracles.gaussian_w2, (oracles.matched, 0.0)),
}
names = pytest.mark.parametrize("name", KINDS_OF_COUPLING)
few = pytest.mark.parametrize("name", [pytest.param("cw2", marks=slow), "gaussian-cw2"])
# Five class means span four dimensions, so that none of three is left to the coupling.
DETERMINED = {"d": 3, "classes": 5}
# Few classes leave directions open to the Gaussian coupling, in which the teacher has a spread.
OTHERS = ((40, 8, 4), (24, 40, 5), (24, 8, 1), (40, 8, 2), (128, 64, 5))
SHAPES = [(40, 3, 5), *(pytest.param(*shape, marks=slow) for shape in OTHERS)]


def turn(d, seed=7):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def clouds(kind="clustered", n=40, d=8, classes=4, seed=0):
    """Student and teacher, whose space is another one, and labels."""
    x, y, labels = draw(kind, n, d, classes=classes, seed=seed)
    return x, y @ turn(d) + 2, labels


@functools.cache
def rotated(name, **options):
    """Return the loss; of cw2 with the exact solver, which compiles in a third of the time."""
    options = ({"solver": "exact"} if name == "cw2" else {}) | options
    return functools.partial(KINDS_OF_COUPLING[name][0], rotation=True, **options)


def oracle(name, x, y, labels):
    _, distance, couple = KINDS_OF_COUPLING[name]
    return oracles.by_class(distance, *oracles.rotation(x, y, labels, *couple)[:2], labels)


@few
@pytest.mark.parametrize(("n", "d", "classes"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_float64_loops(name, n, d, classes, kind):
    x, y, labels = clouds(kind, n, d, classes)
    value, _ = compiled(rotated(name))(*single(x, y, labels))
    np.testing.assert_allclose(value, oracle(name, x, y, labels), rtol=1e-3)


@slow
@names
def test_features_that_a_student_does_not_use_are_turned_too(name):
    """Of 16 directions the coupling leaves 8 open: Q is orthogonal there, and no projection."""
    x, y, labels = clouds(n=64, d=16)
    x = x * (np.arange(16) % 2)
    value, _ = compiled(rotated(name))(*single(x, y, labels))
    np.testing.assert_allclose(value, oracle(name, x, y, labels), rtol=1e-3)


@slow
@names
def test_a_teacher_in_another_space_is_as_near(name):
    """Where the class means give all directions; of the exact coupling, where they give some."""
    x, y, labels = clouds(**({"d": 8} if name == "cw2" else DETERMINED))
    d = x.shape[1]
    plain = KINDS_OF_COUPLING[name][0]
    loss = lambda *arrays: compiled(rotated(name))(*arrays)[0]  # noqa: E731
    value = loss(*single(x, y, labels))
    for other in (turn(d, seed=1), np.diag([-1.0] + (d - 1) * [1.0])):  # a rotation, a reflection
        again = loss(*single(x @ other - 5, y @ other.T @ other.T + 1, labels))
        np.testing.assert_allclose(again, value, rtol=1e-3)
    assert value < 0.5 * plain(*single(x, y, labels))
    np.testing.assert_allclose(loss(*single(x, x @ turn(d) + 1, labels)), 0, atol=1e-6)


@slow
@names
def test_the_rotation_is_a_constant_for_the_gradient(name):
    plain, _, couple = KINDS_OF_COUPLING[name]
    x, y, labels = clouds(**DETERMINED)
    *turned, q = oracles.rotation(x, y, labels, *couple)
    _, (slope_s, slope_t) = compiled(plain)(*single(*turned, labels))
    _, (gradient_s, gradient_t) = compiled(rotated(name))(*single(x, y, labels))
    for got, expected in ((gradient_s, slope_s), (gradient_t, slope_t @ q.T)):
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


@few
def test_it_is_the_slope_of_the_value(name):
    """The envelope theorem: to first order neither the coupling nor the rotation moves."""
    x, _, labels = clouds(**DETERMINED)
    y = (x + 0.1 * np.random.default_rng(3).normal(size=x.shape)) @ turn(x.shape[1])
    check(rotated(name), functools.partial(oracle, name), x, y, labels)


@slow
@pytest.mark.parametrize(
    "options",
    [{"solver": "auto"}, {"solver": "sinkhorn"}, {"solver": "ipot"},
     {"solver": "auto", "debiased": True}],
)  # fmt: skip
def test_every_solver(options):
    x, y, labels = clouds()
    exact = rotated("cw2")(*single(x, y, labels))
    value, info = rotated("cw2", **options, has_aux=True)(*single(x, y, labels))
    np.testing.assert_allclose(value, exact, rtol=2e-2)
    assert info.converged and info.coupling.shape == (40, 40)


@slow
def test_other_examples_and_rows_left_out():
    x, y, labels = clouds(n=48)
    there = np.arange(48) % 3 > 0
    some = single(x[there], y[there], labels[there])
    for name in KINDS_OF_COUPLING:
        loss = rotated(name, **({"solver": "ipot"} if name == "cw2" else {}))
        expected = loss(*some)
        broken = single(np.where(there[:, None], x, np.nan), y, labels)
        np.testing.assert_allclose(loss(*broken, where=there), expected, rtol=2e-3)
        marked = np.where(there, labels, -1)
        np.testing.assert_allclose(loss(*single(x, y, marked)), expected, rtol=2e-3)
        # The teacher's rows in another order, some of a class that the student has not.
        more = np.concatenate([y[there][::-1], 9 + y[:3]]), np.append(labels[there][::-1], [7] * 3)
        apart = loss(*single(x, more[0], marked), labels_t=more[1])
        np.testing.assert_allclose(apart, expected, rtol=2e-3)


@slow
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_class_statistics(covariance):
    x, y, labels = clouds()
    if covariance == "diagonal":  # rows whose covariances are that
        signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
        x, labels = x[:32, :3], np.repeat(np.arange(4), 8)
        y = np.random.default_rng(0).normal(size=(4, 3))[labels] + np.tile(signs, (4, 1)) * 0.3
    statistics = losses.class_statistics(*single(y, labels), covariance=covariance, num_classes=6)
    loss = rotated("gaussian-cw2")
    z_s, z_t, labels = single(x, y, labels)
    value, gradient = jax.value_and_grad(loss)(z_s, statistics, labels)
    expected, slope = jax.value_and_grad(loss)(z_s, z_t, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    np.testing.assert_allclose(gradient, slope, atol=2e-3 * jnp.abs(slope).max())
    some = labels.at[:5].set(-1)
    assert np.isfinite(loss(z_s, statistics, some))


@slow
@names
def test_training_against_it_matches_the_classes_in_a_space_of_its_own(name):
    """Gradient steps on the student's features end near a rotation of the teacher's."""
    _, y, labels = clouds()
    z_s, z_t, labels = single(np.random.default_rng(0).normal(size=y.shape), y, labels)
    both = compiled(rotated(name))
    first = both(z_s, z_t, labels)[0]
    for _ in range(200):
        z_s = z_s - 4 * both(z_s, z_t, labels)[1][0]
    assert both(z_s, z_t, labels)[0] < 1e-3 * first
    assert KINDS_OF_COUPLING[name][0](z_s, z_t, labels) > 0.1 * first


def test_mistakes_are_named():
    x, y, labels = single(*clouds())
    with pytest.raises(ValueError, match="rotation=True mixes features, which covariance='diag"):
        losses.gaussian_cw2(x, y, labels, covariance="diagonal", rotation=True)
    with pytest.raises(ValueError, match="rotation must be true or false, got 1"):
        losses.cw2(x, y, labels, rotation=1)  # pyright: ignore


def test_a_start_that_sees_none_of_the_rows_decides_nothing_by_rounding():
    """Class 0 of y lies across the direction of the means: the rest along it is rounding."""
    x, y = np.zeros((6, 3)), np.zeros((6, 3))
    x[0, 0] = 1.5
    y[0, :2] = y[5, 0] = 1
    labels = np.array([0, 1, 0, 0, 0, 1])
    run = rotated("gaussian-cw2")
    value, _ = compiled(run)(*single(x, y, labels))
    for a, b in ((y, x), (x @ turn(3), y), (x, y @ turn(3)), (y, x @ turn(3, seed=1))):
        other, _ = compiled(run)(*single(a, b, labels))
        np.testing.assert_allclose(other, value, rtol=1e-5)


def test_what_is_open_on_one_side_may_lie_across_what_is_open_on_the_other():
    """The student has no spread along e3, the teacher none along (1, -1, 0), once turned."""
    x, y = np.ones((6, 3)), np.zeros((6, 3))
    x[0, 0] = x[3, 1] = 0
    y[0, 2] = y[1, 0] = y[5, 1] = 1
    labels = np.array([0, 1, 1, 1, 1, 1])
    run = rotated("gaussian-cw2")
    value, _ = compiled(run)(*single(x, y, labels))
    np.testing.assert_allclose(value, oracle("gaussian-cw2", x, y, labels), rtol=1e-4)
    other, _ = compiled(run)(*single(y, x, labels))
    np.testing.assert_allclose(other, value, rtol=1e-5)


@pytest.mark.parametrize("d", [2, 3, 9, 64])
@pytest.mark.parametrize("seed", range(3))
def test_every_partial_isometry_is_completed(d, seed):
    """Also from e_1 .. e_r to e_(d - r) .. e_d, whose complements have nothing in common."""
    rng = np.random.default_rng(seed)
    for rank in {0, 1, d // 2, d - 1, d}:
        u, v = np.eye(d)[:, :rank], np.eye(d)[:, d - rank :]
        if seed:
            u, v = (np.linalg.qr(rng.normal(size=(d, d)))[0][:, :rank] for _ in "uv")
        p = (u @ v.T).astype(np.float32)
        q = np.asarray(completed(p))
        np.testing.assert_allclose(q @ q.T, np.eye(d), atol=1e-5)
        np.testing.assert_allclose(q @ v, u, atol=1e-5)
        np.testing.assert_allclose(completed(p.T), q.T, atol=2e-4)
