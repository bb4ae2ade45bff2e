"""The earlier methods' losses against their float64 textbook form, and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import check
from clouds import KINDS, draw
from draws import draw_cost, draw_logits, draw_maps, single
from reference import family, oracles
from scipy.special import log_softmax

from kd2m_jax import Outputs, losses
from kd2m_jax.losses._mmd import KERNELS

slow = pytest.mark.slow  # one oracle of each loss is among the fast tests

kernels = pytest.mark.parametrize("kernel", KERNELS)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=slow), 4.0])
def test_kd(temperature, standardize):
    h_s, h_t, _ = draw_logits()
    loss = functools.partial(losses.kd, temperature=temperature, standardize=standardize)
    oracle = functools.partial(family.kd, temperature=temperature, standardize=standardize)
    check(loss, oracle, h_s, h_t)


@slow
def test_standardized_kd_does_not_see_the_size_of_logits_and_takes_rows_of_equal_ones():
    h_s, h_t, _ = draw_logits()
    both = jax.jit(jax.value_and_grad(functools.partial(losses.kd, standardize=True), (0, 1)))
    value, (gradient, _) = both(*single(h_s, h_t))
    for c in (1e-8, 1e12):
        again, (its_gradient, _) = both(*single(c * h_s + c, h_t - 3))
        np.testing.assert_allclose(again, value, rtol=1e-4)
        np.testing.assert_allclose(c * its_gradient, gradient, atol=1e-4 * jnp.abs(gradient).max())
    # Equal logits are zeros, of whatever size: the other rows are what they were.
    h_s[3], h_t[5] = 0.1, -7.3
    value, gradients = both(*single(h_s, h_t))
    expected = [family.kd(*rows, temperature=4.0, standardize=True) for rows in zip(
        np.delete(h_s, (3, 5), 0)[:, None], np.delete(h_t, (3, 5), 0)[:, None], strict=True
    )]  # fmt: skip
    scores = [(h - h.mean()) / h.std() for h in (h_t[3], h_s[5])]
    flat = np.zeros((1, 7))
    expected.append(family.kd(flat, scores[0][None], temperature=4.0))
    expected.append(family.kd(scores[1][None], flat, temperature=4.0))
    np.testing.assert_allclose(value, np.sum(expected) / len(h_s), rtol=1e-4)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.any(gradients[0][3]) and not np.any(gradients[1][5])


OPTIONS = {
    "linear": ({},),
    "polynomial": ({}, {"degree": 3, "offset": 0.5}),
    "rbf": ({}, {"bandwidth": "median"}, {"bandwidth": 2.5}),
    "energy": ({},),
}
cases = pytest.mark.parametrize(
    ("kernel", "options"),
    [
        pytest.param(kernel, options, marks=() if kernel == "rbf" and not options else slow)
        for kernel in KERNELS
        for options in OPTIONS[kernel]
    ],
)


def oracle_options(x, y, kernel, options):
    """Return options as the oracle takes them: sigma, a constant, is computed first."""
    if kernel != "rbf":
        return options
    width = options.get("bandwidth", "mean")
    return {"sigma": family.bandwidth(x, y, width) if isinstance(width, str) else width}


@cases
@pytest.mark.parametrize("kind", KINDS)
def test_mmd_and_cmmd(kind, kernel, options):
    x, y, labels = draw(kind, 30, 48, classes=5)
    known = oracle_options(x, y, kernel, options)
    oracle = functools.partial(family.mmd, kernel=kernel, **known)
    # A discrepancy far below the kernel's own size is what float32 leaves of it.
    atol = 2e-7 * np.abs(family.kernel_matrix(x, y, kernel, **known)).mean()
    value = losses.mmd(*single(x, y), kernel=kernel, **options)
    np.testing.assert_allclose(value, oracle(x, y), rtol=1e-3, atol=atol)
    value = losses.cmmd(*single(x, y, labels), kernel=kernel, **options)
    expected = oracles.by_class(oracle, x, y, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=atol)


@slow
@cases
def test_mmd_and_cmmd_values_and_gradients(kernel, options):
    marginal = functools.partial(losses.mmd, kernel=kernel, **options)
    conditional = functools.partial(losses.cmmd, kernel=kernel, **options)
    for kind in KINDS:
        x, y, labels = draw(kind, 24, 10, classes=3)
        known = oracle_options(x, y, kernel, options)
        oracle = functools.partial(family.mmd, kernel=kernel, **known)
        atol = 2e-7 * np.abs(family.kernel_matrix(x, y, kernel, **known)).mean()
        check(marginal, oracle, x, y, atol=atol)
        by_class = functools.partial(oracles.by_class, oracle)
        check(conditional, by_class, x, y, labels, atol=atol)


@slow
@kernels
@pytest.mark.parametrize(("n", "m"), [(40, 12), (12, 40)])
def test_mmd_between_clouds_of_unequal_size(n, m, kernel):
    x, y, _ = draw("gaussian", 40, 8)
    x, y = x[:n], y[:m]
    expected = family.mmd(x, y, kernel, **oracle_options(x, y, kernel, {}))
    np.testing.assert_allclose(losses.mmd(*single(x, y), kernel=kernel), expected, rtol=1e-3)


NST_OPTIONS = [
    ("linear", {}),
    ("polynomial", {}),
    ("polynomial", {"degree": 3, "offset": 1.0}),
    ("rbf", {}),
]


@pytest.mark.parametrize(("kernel", "options"), NST_OPTIONS)
@pytest.mark.parametrize("size_s", [(8, 4, 9), pytest.param((2, 4, 1), marks=slow)])
def test_nst(size_s, kernel, options):
    maps_s, maps_t = draw_maps(size_s=size_s)
    expected = family.nst(maps_s, maps_t, kernel, **{"offset": 0.0, **options})
    value = losses.nst(*single(maps_s, maps_t), kernel=kernel, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-3)


@slow
@pytest.mark.parametrize(("kernel", "options"), NST_OPTIONS)
def test_nst_gradients(kernel, options):
    maps_s, maps_t = draw_maps()
    maps_t = maps_t[..., :-1]  # the length of a dead channel is not differentiable
    loss = functools.partial(losses.nst, kernel=kernel, **options)
    sigmas = family.nst_bandwidths(maps_s, maps_t)

    def oracle(maps_s, maps_t):
        return family.nst(maps_s, maps_t, kernel, sigmas=sigmas, **{"offset": 0.0, **options})

    check(loss, oracle, maps_s, maps_t)


@slow
def test_nst_stages():
    first, last = draw_maps(), draw_maps(size_s=(2, 2, 8), size_t=(4, 4, 5), seed=1)
    maps_s, maps_t = (tuple(single(*pair)) for pair in zip(first, last, strict=True))
    by_stage = [float(losses.nst(maps_s[i], maps_t[i])) for i in (0, 1)]
    assert by_stage[0] != by_stage[1]
    for stages, expected in ((None, by_stage[1]), (0, by_stage[0]), ((0, -1), sum(by_stage))):
        value = losses.nst(maps_s, list(maps_t), stages=stages)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("uniform", "options"),
    [
        (False, {"temperature": 8.0, "target_coef": 1 / 600}),
        *(
            pytest.param(uniform, options, marks=slow)
            for uniform, options in [
                (True, {"temperature": 8.0, "target_coef": 0.0}),
                (False, {"temperature": 8.0, "target_coef": 0.0}),
                (False, {"temperature": 1.0, "target_coef": 1 / 600}),
                (False, {"temperature": 2.0, "target_coef": 1.0, "epsilon": 0.2, "n_iters": 1}),
                (False, {"temperature": 2.0, "target_coef": 0.0, "epsilon": 0.02, "n_iters": 50}),
            ]
        ),
    ],
)
def test_wkd_l(uniform, options):
    h_s, h_t, labels = draw_logits()
    cost = 1 - np.eye(7) if uniform else draw_cost(7)
    given = {} if uniform else {"class_cost": jnp.asarray(cost, jnp.float32)}
    loss = functools.partial(losses.wkd_l, labels=jnp.asarray(labels), **options, **given)
    oracle = functools.partial(family.wkd_l, labels=labels, cost=cost, **options)
    # The iterations are part of the loss, so its gradient is that of its value.
    check(loss, oracle, h_s, h_t)


@slow
def test_wkd_l_makes_up_the_published_loss():
    h_s, h_t, labels = draw_logits()
    lam, features = 600.0, jnp.zeros((24, 2))
    student, teacher = (Outputs(features, h) for h in single(h_s, h_t))
    metric = losses.get_metric("wkd-l", target_coef=1 / lam, class_cost=draw_cost(7))
    loss, _ = losses.distillation_loss(
        student, teacher, jnp.asarray(labels), metric=metric, coef=lam
    )
    known = {"temperature": 8.0, "cost": draw_cost(7)}
    distance = family.wkd_l(h_s, h_t, labels, target_coef=0, **known)
    target = family.wkd_l(h_s, h_t, labels, target_coef=1, **known) - distance
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
        *single(h_s, labels)
    ).mean()
    np.testing.assert_allclose(loss, cross_entropy + target + lam * distance, rtol=1e-4)


@slow
def test_wkd_l_takes_a_traced_cost_and_gives_it_a_gradient():
    h_s, h_t, labels = single(*draw_logits())
    cost = draw_cost(7)
    gradient = jax.jit(jax.grad(lambda c: losses.wkd_l(h_s, h_t, labels, class_cost=c)))
    direction = draw_cost(7, seed=1)

    def oracle(c):
        return family.wkd_l(*draw_logits(), temperature=8.0, target_coef=1 / 600, cost=c)

    expected = oracles.directional_derivative(oracle, cost, direction)
    actual = (np.asarray(gradient(jnp.asarray(cost, jnp.float32))) * direction).sum()
    np.testing.assert_allclose(actual, expected, rtol=2e-2)


def test_class_cost_matrix():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), [70, 75, 90, 80]))  # two blocks of rows
    features = rng.normal(size=(len(labels), 6)) * (1 + labels[:, None])
    features += 0.5 * rng.normal(size=(len(labels), 1))
    for kappa, scale in ((1.0, 1.0), (3.0, 1e4), (1.0, 1e-4)):
        cost = losses.class_cost_matrix(
            *single(scale * features, labels), num_classes=4, kappa=kappa
        )
        expected = family.class_cost(features, labels, 4, kappa)
        np.testing.assert_allclose(cost, expected, rtol=1e-3)
    constant = losses.class_cost_matrix(jnp.ones((8, 3)), jnp.arange(8) % 2, num_classes=2)
    np.testing.assert_allclose(constant, (1 - np.exp(-1)) * (1 - np.eye(2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("grid", "gamma"),
    [(2, 4.0), *(pytest.param(*c, marks=slow) for c in [(1, 4.0), (2, 0.0), (4, 4.0), (4, 0.0)])],
)
def test_wkd_f(grid, gamma):
    maps_s, maps_t = draw_maps(size_t=(4, 4, 6))
    loss = functools.partial(losses.wkd_f, grid=grid, mean_coef=gamma)
    oracle = functools.partial(family.wkd_f, grid=grid, gamma=gamma)
    if grid < 4 or gamma:  # a cell of one position has no variance to speak of
        check(loss, oracle, maps_s, maps_t)
    else:
        assert loss(*single(maps_s, maps_t)) == 0


@slow
def test_wkd_f_uses_the_last_stage_and_compares_maps_of_unequal_size():
    maps_s, maps_t = single(*draw_maps(size_s=(4, 4, 6), size_t=(4, 4, 6)))
    twice = jnp.repeat(maps_t, 2, axis=1)
    np.testing.assert_allclose(
        losses.wkd_f((twice, maps_s), (maps_s, twice), mean_coef=1e6),
        losses.wkd_f(maps_s, maps_t, mean_coef=1e6),
        rtol=1e-4,  # the means are the same, the unbiased variances nearly
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0, 300.0, 1e5])
@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-4])
def test_kd_near_equality_and_at_high_temperatures(temperature, step):
    """First-order terms cancelled in float32: at step 1e-4 and T = 4 the value was -43 of 1."""
    h_t = draw_logits()[1].astype(np.float32).astype(np.float64)
    h_s = h_t + step * np.random.default_rng(1).normal(size=h_t.shape)
    h_s = h_s.astype(np.float32).astype(np.float64)
    log_s, log_t = (log_softmax(h / temperature, axis=1) for h in (h_s, h_t))
    expected = temperature**2 * (np.exp(log_t) * (log_t - log_s)).sum(1).mean()
    if temperature == 1e5:  # float64 cancels here too: half the variance is all that is left
        p, gap = np.exp(log_t), h_s - h_t
        gap = gap - (p * gap).sum(1, keepdims=True)
        expected = (p * gap**2).sum(1).mean() / 2
    slope = temperature * (np.exp(log_s) - np.exp(log_t)) / len(h_s)
    loss = functools.partial(losses.kd, temperature=temperature)
    value, gradient = jax.value_and_grad(loss)(*single(h_s, h_t))
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    np.testing.assert_allclose(gradient, slope, atol=1e-3 * np.abs(slope).max())
