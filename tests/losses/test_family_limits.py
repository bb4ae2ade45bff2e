"""The earlier methods' losses at their limits: degenerate inputs, memory, mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import draw
from draws import draw_cost, draw_logits, draw_maps, single
from reference import family, oracles

from kd2m_jax import Outputs, losses
from kd2m_jax.losses._mmd import KERNELS

pytestmark = pytest.mark.slow  # the fast tests are those of the paper's metrics


def finite(function):
    """Compile a test of whether value and gradients are finite."""

    def test(*arrays):
        results = jax.value_and_grad(function, argnums=(0, 1))(*arrays)
        return jnp.all(jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(results)]))

    return jax.jit(test)


@pytest.mark.parametrize(
    ("kernel", "bandwidth"), [*((k, "mean") for k in KERNELS), ("rbf", "median"), ("rbf", 0.3)]
)
def test_mmd_is_finite_on_degenerate_clouds(kernel, bandwidth):
    x, y = single(*draw("gaussian", 12, 20)[:2])
    point, zeros = jnp.broadcast_to(x[:1], x.shape), jnp.zeros_like(x)
    clouds = {
        "identical": (x, x),
        "one point": (point, point),
        "two points": (point, jnp.broadcast_to(y[:1], y.shape)),
        "at zero": (zeros, zeros),
        "far away": (point + 1e4, point + 1e4),
        "small": (1e-4 * x, 1e-4 * y),
        "large": (1e4 * x, 1e4 * y),
        "repeated": (x.at[1].set(x[0]), y.at[:2].set(x[0])),
        "one sample": (x[:1], y[:1]),
        "one sample, the same": (x[:1], x[:1]),
        "dead": (x.at[:, :19].set(0), y.at[:, :19].set(0)),
    }
    options = {"kernel": kernel, "bandwidth": bandwidth}
    marginal = finite(functools.partial(losses.mmd, **options))
    conditional = finite(functools.partial(losses.cmmd, **options))
    for case, (a, b) in clouds.items():
        assert marginal(a, b), case
        for labels in (jnp.zeros(len(a), int), jnp.arange(len(a))):
            assert conditional(a, b, labels), case


def test_energy_distance_sees_points_closer_than_its_rounding():
    # Two tight clusters far apart: an expansion of the squares would not tell members apart.
    x = np.random.default_rng(0).normal(size=(16, 8)) * 1e-3 + 10 * (np.arange(16) % 2)[:, None]
    y = x + 1e-3
    x, y = (np.float64(np.float32(a)) for a in (x, y))
    np.testing.assert_allclose(
        losses.mmd(*single(x, y), kernel="energy"), family.mmd(x, y, "energy"), atol=1e-6
    )
    loss = functools.partial(losses.cmmd, labels=jnp.arange(16) % 2, kernel="energy")
    oracle = functools.partial(family.mmd, kernel="energy")
    expected = oracles.by_class(oracle, x, y, np.arange(16) % 2)
    np.testing.assert_allclose(loss(*single(x, y)), expected, rtol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS[:3])
def test_nst_is_finite_on_degenerate_maps(kernel):
    maps_s, maps_t = single(*draw_maps(size_t=(4, 4, 6)))
    loss = finite(functools.partial(losses.nst, kernel=kernel))
    zeros, ones = jnp.zeros_like(maps_s), jnp.ones_like(maps_s)
    for a, b in (
        (maps_s, maps_s),
        (zeros, zeros),
        (zeros, maps_t),
        (ones, ones),
        (1e-4 * maps_s, 1e4 * maps_t),
        (maps_s[:1, :1, :1], maps_t[:1, :1, :1]),
        (maps_s[..., :1], maps_t),
    ):
        assert loss(a, b)


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_wkd_f_is_finite_on_degenerate_maps(grid):
    maps_s, maps_t = single(*draw_maps(size_t=(4, 4, 6)))
    loss = finite(functools.partial(losses.wkd_f, grid=grid))
    zeros = jnp.zeros_like(maps_s)
    for a, b in ((maps_s, maps_s), (zeros, zeros), (1e-4 * maps_s, 1e4 * maps_t), (zeros, maps_t)):
        assert loss(a, b)


def test_logit_losses_are_finite_on_degenerate_logits():
    h_s, h_t, labels = single(*draw_logits())
    saturated = 2e4 * jax.nn.one_hot(labels, 7) - 1e4
    wrong = jnp.roll(saturated, 1, axis=1)
    cost = jnp.asarray(draw_cost(7), jnp.float32)
    wkd_l = functools.partial(losses.wkd_l, labels=labels)
    functions = [
        losses.kd,
        functools.partial(losses.kd, temperature=0.1),
        functools.partial(losses.kd, temperature=0.1, standardize=True),
        functools.partial(wkd_l, class_cost=cost),
        functools.partial(wkd_l, temperature=0.1, epsilon=1e-4, class_cost=100 * cost),
        functools.partial(wkd_l, class_cost=0 * cost),
    ]
    zeros = jnp.zeros_like(h_s)
    for function in map(finite, functions):
        for a, b in (
            (h_s, h_s),
            (zeros, zeros),
            (saturated, saturated),
            (wrong, saturated),
            (saturated, wrong),
            (1e-4 * h_s, 1e4 * h_t),
        ):
            assert function(a, b)


# Options that no metric's name sets; the names are walked by test_numerics and test_contract.
CALLS = {
    "kd": (functools.partial(losses.kd, temperature=1.0), draw_logits()[:2]),
    "kd-standardize": (functools.partial(losses.kd, standardize=True), draw_logits()[:2]),
    "wkd-l": (functools.partial(losses.wkd_l, class_cost=draw_cost(7)), draw_logits()),
    "nst-linear": (functools.partial(losses.nst, kernel="linear"), draw_maps()),
    "nst-rbf": (functools.partial(losses.nst, kernel="rbf"), draw_maps()),
    "wkd-f": (functools.partial(losses.wkd_f, grid=2), draw_maps(size_t=(4, 4, 6))),
    "mmd": (functools.partial(losses.mmd, bandwidth="median"), draw("gaussian", 12, 5)[:2]),
    "cmmd": (functools.partial(losses.cmmd, bandwidth=2.0), draw("gaussian", 12, 5)),
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_laws_of_a_loss(name):
    loss, arrays = CALLS[name]
    arrays = single(*arrays)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (gradient, _) = run(*arrays)
    assert value.dtype == jnp.float32 and value.shape == () and value > 0
    order = np.random.default_rng(0).permutation(len(arrays[0]))
    shuffled, (its_gradient, _) = run(*(a[order] for a in arrays))
    largest = jnp.abs(gradient).max()
    np.testing.assert_allclose(shuffled, value, rtol=1e-4)
    np.testing.assert_allclose(its_gradient, gradient[order], atol=1e-4 * largest)
    if arrays[0].shape == arrays[1].shape and name != "wkd-l":  # Sinkhorn's plan is blurred
        at_equality, (gradient, _) = run(arrays[0], arrays[0], *arrays[2:])
        np.testing.assert_allclose(at_equality, 0, atol=1e-6 * value)
        np.testing.assert_allclose(gradient, 0, atol=1e-4 * largest)
    half = [a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a for a in arrays]
    rounded = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in half]
    assert loss(*half).dtype == jnp.float32
    np.testing.assert_allclose(loss(*half), run(*rounded)[0], rtol=1e-6)
    batched = jax.vmap(loss)(*(jnp.stack([a, a]) for a in arrays))
    np.testing.assert_allclose(batched, [value, value], rtol=1e-5)


@calls
def test_one_bad_number_makes_the_value_non_finite(name):
    loss, arrays = CALLS[name]
    arrays = single(*arrays)
    for which in (0, 1):
        for bad in (np.nan, np.inf, -np.inf):
            for column in range(arrays[which].shape[-1]):
                broken = list(arrays)
                broken[which] = broken[which].at[3, ..., column].set(bad)
                assert not jnp.isfinite(loss(*broken)), (which, bad, column)


def test_a_label_that_is_no_class_makes_wkd_l_non_finite():
    h_s, h_t, labels = single(*draw_logits())
    for bad in (-2, 7):
        assert jnp.isnan(losses.wkd_l(h_s, h_t, labels.at[0].set(bad)))


# Memory


def temporary_bytes(function, *shapes):
    """Return what value and gradient need beside their arguments and results."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(function)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def naive_nst(maps_s, maps_t):
    """Compute the polynomial kernel as it is often written: all pairs of channels, by position."""
    x, y = (m.reshape(m.shape[0], -1, m.shape[3]).swapaxes(1, 2) for m in (maps_s, maps_t))
    x, y = (z / jnp.linalg.norm(z, axis=2, keepdims=True) for z in (x, y))

    def mean(a, b):
        return jnp.mean(jnp.sum(a[:, :, None, :] * b[:, None, :, :], axis=3) ** 2)

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


@pytest.mark.parametrize("kernel", KERNELS[:3])
def test_nst_does_not_hold_pairs_of_maps(kernel):
    n, hw, c_s, c_t = 8, 64, 96, 128
    shapes = (n, 8, 8, c_s), (n, 8, 8, c_t)
    used = temporary_bytes(functools.partial(losses.nst, kernel=kernel), *shapes)
    maps, pairs = 4 * n * (c_s + c_t) * hw, 4 * n * (c_s + c_t) ** 2
    assert used < 4 * maps + (0 if kernel == "linear" else 2 * pairs)
    if kernel == "polynomial":
        assert temporary_bytes(naive_nst, *shapes) > 10 * used
        a, b = (jax.random.uniform(jax.random.key(0), shape) for shape in shapes)
        np.testing.assert_allclose(losses.nst(a, b), naive_nst(a, b), rtol=1e-2)


def test_the_memory_that_the_docstring_of_nst_gives():
    shapes = (64, 8, 8, 64), (64, 8, 8, 256)
    for function, mebibytes in ((losses.nst, 17), (naive_nst, 391)):
        assert f"{mebibytes}" in losses.nst.__doc__
        assert temporary_bytes(function, *shapes) / 2**20 == pytest.approx(mebibytes, rel=0.1)


@pytest.mark.parametrize("kernel", ["rbf", "energy"])
def test_mmd_does_not_hold_pairs_of_features(kernel):
    n, d = 96, 128
    used = temporary_bytes(functools.partial(losses.mmd, kernel=kernel), (n, d), (n, d))
    assert used < 4 * (20 * n * n + 10 * n * d) < 4 * n * n * d / 3


# Errors


def test_errors_say_what_was_expected():
    h, z, labels = jnp.zeros((4, 3)), jnp.zeros((4, 2)), jnp.zeros(4, int)
    maps, cost = jnp.zeros((4, 6, 6, 2)), losses.class_cost_matrix
    for error, message, call in (
        (ValueError, "temperature must be > 0", lambda: losses.kd(h, h, temperature=0.0)),
        (ValueError, "same classes", lambda: losses.kd(h, z)),
        (ValueError, "4 rows and logits_t has 3", lambda: losses.kd(h, h[:3])),
        (ValueError, "did you mean polynomial", lambda: losses.mmd(z, z, kernel="polynomal")),
        (ValueError, "did you mean median", lambda: losses.mmd(z, z, bandwidth="medain")),
        (ValueError, "bandwidth must be > 0", lambda: losses.mmd(z, z, bandwidth=0.0)),
        (ValueError, "degree must be an integer >= 1", lambda: losses.mmd(z, z, degree=0)),
        (ValueError, "offset must be >= 0", lambda: losses.mmd(z, z, offset=-1.0)),
        (ValueError, "kd2m_jax.projected", lambda: losses.cmmd(z, h, labels)),
        (ValueError, "unknown kernel 'energy'", lambda: losses.nst(maps, maps, kernel="energy")),
        (ValueError, "2 x 4", lambda: losses.nst(maps[:, :4], maps[:, :2, :4])),
        (ValueError, "no stage 1", lambda: losses.nst(maps, maps, stages=(0, 1))),
        (ValueError, "at least one stage", lambda: losses.nst(maps, maps, stages=())),
        (ValueError, "height, width, channels", lambda: losses.nst(z, z)),
        (ValueError, "4 rows and maps_t has 2", lambda: losses.wkd_f(maps, maps[:2])),
        (ValueError, "with a projector", lambda: losses.wkd_f(maps, maps[..., :1])),
        (ValueError, "grid=4 must divide", lambda: losses.wkd_f(maps, maps, grid=4)),
        (TypeError, "floating-point", lambda: losses.wkd_f(maps.astype(int), maps)),
        (ValueError, "k >= 2", lambda: losses.wkd_l(h[:, :1], h[:, :1], labels)),
        (ValueError, r"\[3, 3\]", lambda: losses.wkd_l(h, h, labels, class_cost=jnp.eye(2))),
        (ValueError, "n_iters must be", lambda: losses.wkd_l(h, h, labels, n_iters=0)),
        (TypeError, "labels must be integers", lambda: losses.wkd_l(h, h, h[:, 0])),
        (ValueError, r"labels must be in \[0, 1\)", lambda: cost(z, labels + 1, num_classes=1)),
        (ValueError, "class 1 has 0", lambda: cost(z, labels, num_classes=2)),
        (TypeError, "outside jit", lambda: jax.jit(lambda y: cost(z, y, num_classes=1))(labels)),
        (ValueError, "needs the student's maps", lambda: losses.get_metric("nst")((z,), (z,))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_get_metric_tries_options_out_and_stays_hashable():
    cost = draw_cost(7)
    metric = losses.get_metric("wkd-l", class_cost=cost)
    assert hash(metric) == hash(metric) and metric == metric and "[7, 7]" in repr(metric)
    h_s, h_t, labels = single(*draw_logits())
    student, teacher = Outputs(h_s, h_s), Outputs(h_t, h_t)
    expected = losses.wkd_l(h_s, h_t, labels, class_cost=jnp.asarray(cost, jnp.float32))
    call = jax.jit(lambda metric, *args: metric(*args), static_argnums=0)
    np.testing.assert_allclose(call(metric, student, teacher, labels), expected, rtol=1e-6)
    assert losses.get_metric("nst", stages=(0, 1, -1)).needs == ("maps",)
    assert losses.get_metric("wkd-f", grid=4).needs == ("maps",)
    assert losses.get_metric("mmd_rbf", bandwidth="median") != losses.get_metric("mmd-rbf")
    with pytest.raises(ValueError, match="did you mean mmd-rbf"):
        losses.get_metric("mmd-rbff")
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        losses.get_metric("wkd-l", class_cost=np.zeros((3, 2)))
