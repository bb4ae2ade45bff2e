"""IPOT, the Sinkhorn divergence, sliced and Gromov distances: oracles, limits, relations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from clouds import KINDS, draw
from reference import oracles, transport

from kd2m_jax import Outputs, losses

slow = pytest.mark.slow  # one oracle of each loss is among the fast tests

kinds = pytest.mark.parametrize("kind", KINDS)
KEY = jax.random.key(0)
IPOT = (("solver", "ipot"),)
DEBIASED = (("debiased", True), ("epsilon", 0.3))


def single(*arrays):
    return [jnp.asarray(a, jnp.float32 if a.dtype.kind == "f" else jnp.int32) for a in arrays]


@functools.cache
def compiled(function, options):
    call = functools.partial(function, has_aux=True, **dict(options))
    return jax.jit(jax.value_and_grad(call, argnums=(0, 1), has_aux=True))


def run(function, *arrays, options=()):
    """Value, info, and gradients for both clouds in float64: one compilation a shape."""
    (value, info), grads = compiled(function, options)(*single(*arrays))
    return value, info, [np.asarray(g, np.float64) for g in grads]


def logits_of(x, classes=5, seed=1):
    return x @ np.random.default_rng(seed).normal(size=(x.shape[1], classes)) / x.shape[1] ** 0.5


def check_plan(info, rows, columns):
    plan = np.asarray(info.coupling, np.float64)
    assert bool(info.converged)
    assert plan.min() >= 0
    np.testing.assert_allclose(plan.sum(1), rows, rtol=1e-5)
    assert np.abs(plan.sum(0) - columns).sum() < 1e-3
    return plan


def check_slopes(oracle, clouds, grads, step=1e-4):
    """Gradients against differences of the oracle, along themselves and along noise."""
    for k, (cloud, grad) in enumerate(zip(clouds, grads, strict=True)):

        def along(z, k=k):
            return oracle(z, clouds[1]) if k == 0 else oracle(clouds[0], z)

        for direction in (grad, np.random.default_rng(k).normal(size=cloud.shape)):
            direction = direction / np.linalg.norm(direction)
            slope = oracles.directional_derivative(along, cloud, direction, step)
            atol = 1e-3 * np.linalg.norm(grad)
            np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-2, atol=atol)


# --- IPOT -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(("n", "d", "classes"), [(40, 96, 2), pytest.param(96, 12, 7, marks=slow)])
@pytest.mark.parametrize("function", [losses.w2, losses.cw2])
def test_ipot_is_exact(kind, n, d, classes, function):
    x, y, labels = draw(kind, n, d, classes=classes)
    cost, same = oracles.distances(x, y), labels[:, None] == labels
    weights, exact, rest = np.full(n, 1 / n), oracles.w2(x, y), ()
    if function is losses.cw2:
        weights, rest = 1 / (classes * same.sum(1)), (labels,)
        exact = oracles.by_class(oracles.w2, x, y, labels)
    value, info, grads = run(function, x, y, *rest, options=IPOT)
    plan = check_plan(info, weights, weights)
    assert info.n_iters < 200
    np.testing.assert_allclose(value, exact, rtol=2e-3)
    np.testing.assert_allclose(value, (plan * cost).sum(), rtol=1e-4)
    assert not rest or plan[~same].max(initial=0) == 0
    for grad, p, z, other in zip(grads, (plan, plan.T), (x, y), (y, x), strict=True):
        expected = 2 * (p.sum(1)[:, None] * z - p @ other)
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=atol)


@slow
@pytest.mark.parametrize("kind", ["clustered", "nearly matched", "power-law"])
@pytest.mark.parametrize("m", [40, 64])
def test_ipot_moves_mass_between_clusters(kind, m):
    """Where the first dual bound is a tenth of the optimum, and Sinkhorn is lost."""
    x, y, labels = draw(kind, 64, 16, classes=5)
    frequency = (labels + 1) / (labels + 1).sum()
    y = y[np.random.default_rng(1).choice(64, m, p=frequency)]
    value, info, _ = run(losses.w2, x, y, options=IPOT)
    check_plan(info, np.full(64, 1 / 64), 1 / m)
    np.testing.assert_allclose(value, oracles.w2(x, y), rtol=2e-3)


@slow
@pytest.mark.parametrize("label_cost", ["cross_entropy", "kl", "sqeuclidean"])
def test_ipot_of_a_joint_cost(label_cost):
    x, y, _ = draw("clustered", 48, 16)
    arrays = x, y[:32], logits_of(x), logits_of(y[:32], seed=2)
    expected = oracles.jw2(*arrays, beta=2.0, kind=label_cost)
    value = losses.jw2(*single(*arrays), beta=2.0, label_cost=label_cost, solver="ipot")
    np.testing.assert_allclose(value, expected, rtol=2e-3)


@slow
@pytest.mark.parametrize("label_cost", ["cross_entropy", "kl", "sqeuclidean"])
def test_ipot_gradient_of_a_joint_cost(label_cost):
    """That of the cost with the plan held constant, in features and logits of both networks."""
    x, y, _ = draw("clustered", 20, 8)
    arrays = [x, y[:15], logits_of(x), logits_of(y[:15], seed=2)]
    call = functools.partial(losses.jw2, beta=2.0, label_cost=label_cost, solver="ipot")
    every = jax.grad(functools.partial(call, has_aux=True), argnums=(0, 1, 2, 3), has_aux=True)
    grads, info = every(*single(*arrays))
    plan = check_plan(info, 1 / 20, 1 / 15)

    def cost(x, y, h_s, h_t):
        pairs = oracles.distances(x, y) + 2 * oracles.label_cost(h_s, h_t, label_cost)
        return (plan * pairs).sum()

    for k, grad in enumerate(np.asarray(g, np.float64) for g in grads):
        for direction in (grad, np.random.default_rng(k).normal(size=grad.shape)):

            def along(a, k=k):
                return cost(*arrays[:k], a, *arrays[k + 1 :])

            slope = oracles.directional_derivative(along, arrays[k], direction)
            atol = 1e-4 * np.linalg.norm(grad) * np.linalg.norm(direction)
            np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-3, atol=atol)


def test_the_lohit_preset():
    x, y = single(*draw("clustered", 40, 24)[:2])
    value = losses.get_metric("lohit", epsilon=0.1)(Outputs(x, None), Outputs(y, None))
    assert value == losses.w2(x, y, solver="ipot", epsilon=0.1)
    assert "not public" in losses.METRICS["lohit"].source


# --- The Sinkhorn divergence ------------------------------------------------------------------


@slow
@kinds
def test_divergence(kind):
    x, y, labels = draw(kind, 24, 16, classes=3)
    x, y = 0.1 * x, 0.1 * y  # epsilon is relative, so the unit of the features is no matter
    cost = oracles.distances(x, y)
    check = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6 * cost.mean())
    value, info, _ = run(losses.w2, x, y, options=DEBIASED)
    check(value, transport.divergence(x, y, 0.3 * transport.scale(cost)))
    check_plan(info, np.full(24, 1 / 24), 1 / 24)
    value, _, _ = run(losses.w2, x, y[:16], options=DEBIASED)
    check(value, transport.divergence(x, y[:16], 0.3 * transport.scale(cost[:, :16])))

    def divergence(x, y):  # each class has its own epsilon
        return transport.divergence(x, y, 0.3 * transport.scale(oracles.distances(x, y)))

    value, _, _ = run(losses.cw2, x, y, labels, options=DEBIASED)
    check(value, oracles.by_class(divergence, x, y, labels))
    h_s, h_t = logits_of(x), logits_of(y, seed=2)
    options = (("beta", 3.0), ("label_cost", "sqeuclidean"), *DEBIASED)
    value, _, _ = run(losses.jw2, x, y, h_s, h_t, options=options)
    # Features beside logits: their squared distances are the joint cost.
    wide = [np.hstack([z, 3**0.5 * h]) for z, h in ((x, h_s), (y, h_t))]
    check(value, transport.divergence(*wide, 0.3 * transport.scale(oracles.distances(*wide))))


@slow
@kinds
def test_divergence_is_within_one_percent_of_exact(kind):
    x, y, labels = draw(kind, 96, 12, classes=7)
    value = losses.w2(*single(x, y), debiased=True)
    np.testing.assert_allclose(value, oracles.w2(x, y), rtol=1e-2)
    value = losses.cw2(*single(x, y, labels), debiased=True)
    np.testing.assert_allclose(value, oracles.by_class(oracles.w2, x, y, labels), rtol=1e-2)


@slow
@pytest.mark.parametrize("function", [losses.w2, losses.cw2])
def test_divergence_at_and_near_equality(function):
    x, y, labels = draw("clustered", 24, 16, classes=3)
    rest = (labels,) if function is losses.cw2 else ()
    spread = oracles.distances(x, x).mean()
    value, _, grads = run(function, x, x, *rest, options=DEBIASED)
    assert abs(value) <= 1e-6 * spread
    assert max(np.abs(g).max() for g in grads) <= 1e-5 * spread**0.5
    for step in (1e-1, 1e-2, 1e-3, 1e-5):
        near = x + step * (y - x)
        assert run(function, near, x, *rest, options=DEBIASED)[0] >= -1e-6 * spread


@slow
@pytest.mark.parametrize("function", [losses.w2, losses.cw2])
def test_divergence_gradient_is_that_of_its_value(function):
    """Through both arguments of the self terms; epsilon's scale is a constant."""
    x, y, labels = draw("power-law", 24, 16, classes=3)
    cost = oracles.distances(x, y)
    groups = [labels == c for c in range(3)] if function is losses.cw2 else [labels >= 0]
    regs = [0.3 * transport.scale(cost[np.ix_(g, g)]) for g in groups]

    def oracle(x, y):
        pairs = zip(groups, regs, strict=True)
        return np.mean([transport.divergence(x[g], y[g], reg) for g, reg in pairs])

    rest = (labels,) if function is losses.cw2 else ()
    _, _, grads = run(function, x, y, *rest, options=DEBIASED)
    check_slopes(oracle, (x, y), grads, step=1e-3)


def test_options_that_do_not_go_together():
    z, h = jnp.zeros((4, 2)), jnp.zeros((4, 3))
    for solver in ("exact", "ipot"):
        with pytest.raises(ValueError, match="use solver='sinkhorn'"):
            losses.w2(z, z, solver=solver, debiased=True)
    for label_cost in ("cross_entropy", "kl"):
        with pytest.raises(ValueError, match="use label_cost='sqeuclidean'"):
            losses.jw2(z, z, h, h, label_cost=label_cost, debiased=True)
    with pytest.raises(ValueError, match=r"unknown solver 'ipo': did you mean ipot"):
        losses.w2(z, z, solver="ipo")
    with pytest.raises(ValueError, match="or 'ipot'"):
        losses.w2(z, z[:3], solver="exact")


# --- Sliced -----------------------------------------------------------------------------------


@slow
@kinds
@pytest.mark.parametrize(("n", "m"), [(48, 48), (48, 30), (7, 1)])
def test_sw2_in_one_dimension_is_w2(kind, n, m):
    x, y, _ = draw(kind, 48, 1)
    x, y = x[:n], y[:m]
    value, grad = jax.value_and_grad(losses.sw2)(*single(x, y), key=KEY)
    np.testing.assert_allclose(value, ot.wasserstein_1d(x[:, 0], y[:, 0], p=2), rtol=1e-4)
    plan = ot.emd_1d(x[:, 0], y[:, 0])  # sorted pairing
    expected = 2 * (plan.sum(1)[:, None] * x - plan @ y)
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("m", [48, 30])
def test_sw2_sorts_along_its_own_directions(m):
    x, y, _ = draw("clustered", 48, 6)
    y = y[:m]
    call = functools.partial(losses.sw2, projections=40, key=KEY)
    value, grads = jax.value_and_grad(call, argnums=(0, 1))(*single(x, y))
    directions = np.asarray(jax.random.normal(KEY, (6, 40)), np.float64)
    costs, slopes = [], [0 * x, 0 * y]
    for line in (directions / np.linalg.norm(directions, axis=0)).T:
        p, q = x @ line, y @ line
        plan, gaps = ot.emd_1d(p, q), p[:, None] - q
        costs.append((plan * gaps**2).sum())
        slopes[0] += 2 / 40 * np.outer((plan * gaps).sum(1), line)
        slopes[1] -= 2 / 40 * np.outer((plan * gaps).sum(0), line)
    assert m != 48 or costs[-1] == pytest.approx(((np.sort(p) - np.sort(q)) ** 2).mean())
    np.testing.assert_allclose(value, np.mean(costs), rtol=1e-4)
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad, slope, rtol=1e-3, atol=1e-4 * np.abs(slope).max())


@slow
@kinds
def test_sw2_against_pot(kind):
    x, y, _ = draw(kind, 48, 6)
    for bank in (y, y[:30]):
        value = losses.sw2(*single(x, bank), projections=5_000, key=KEY)
        np.testing.assert_allclose(value, transport.sliced(x, bank), rtol=5e-2)


@slow
def test_sw2_scale_and_directions():
    x, y = single(*draw("clustered", 48, 6)[:2])
    many = functools.partial(losses.sw2, projections=5_000, key=KEY)
    np.testing.assert_allclose(6 * many(x, x + 2.0), 24, rtol=0.06)
    assert 6 * many(x, y) <= oracles.w2(np.asarray(x, float), np.asarray(y, float))
    few = [losses.sw2(x, y, key=key) for key in jax.random.split(KEY, 32)]
    assert np.ptp(few) > 0
    assert abs(np.mean(few) - many(x, y)) < 4 * np.std(few) / 32**0.5 + 0.02 * many(x, y)
    assert losses.sw2(x, y, key=KEY) == losses.sw2(x, y, key=jax.random.key(0))
    assert losses.sw2(x, x, key=KEY) == losses.sw2(x[::-1], x, key=KEY) == 0
    with pytest.raises(ValueError, match="give it a key"):
        losses.sw2(x, y)
    with pytest.raises(ValueError, match="projections must be an integer >= 1"):
        losses.sw2(x, y, projections=0, key=KEY)


# --- Gromov -----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("m", [24, pytest.param(16, marks=slow)])
def test_gw2_is_the_sum_it_claims(kind, m):
    x, y, _ = draw(kind, 24, 6)
    y = np.hstack([y, 0.5 * y[:, :3]])[:m]
    value, info, grads = run(losses.gw2, x, y)
    plan = check_plan(info, np.full(24, 1 / 24), 1 / m)
    objective = functools.partial(transport.gromov_objective, plan=plan)
    np.testing.assert_allclose(value, objective(x, y), rtol=1e-3)
    check_slopes(objective, (x, y), grads)
    # Local minima both, so no more than 10% above POT's from the product of the weights.
    assert value <= 1.1 * transport.gromov(x, y)


@slow
@kinds
def test_gw2_is_no_worse_than_pot(kind):
    x, y, _ = draw(kind, 64, 16, classes=5)
    paired = np.eye(64) / 64
    value, _, _ = run(losses.gw2, x, y)
    assert value <= transport.gromov_objective(x, y, paired) * (1 + 1e-4)
    for start in (None, paired):
        assert value <= 1.02 * transport.gromov(x, y, start)


@slow
def test_gw2_does_not_see_where_the_clouds_are():
    x, y, _ = draw("clustered", 24, 6)
    wide = lambda z: np.hstack([z, np.zeros((24, 3))])  # noqa: E731
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    order = np.random.default_rng(1).permutation(24)
    spread = oracles.distances(x, x).mean()
    for congruent in (wide(x), wide(x) @ turn + 5, -wide(x)):
        value, _, grads = run(losses.gw2, x, congruent)
        assert abs(value) <= 1e-5 * spread
        assert max(np.abs(g).max() for g in grads) <= 1e-4 * spread**0.5
    value, _, _ = run(losses.gw2, x, wide(y))
    for a, b in ((x + 3, -wide(y)), (x[order], wide(y)[order]), (x, wide(y) @ turn)):
        np.testing.assert_allclose(run(losses.gw2, a, b)[0], value, rtol=1e-3)
    np.testing.assert_allclose(run(losses.gw2, 1e3 * x, 1e3 * wide(y))[0], 1e6 * value, rtol=1e-3)


# --- Numerics: the variants that the walk over the catalogue does not reach --------------------

VARIANTS = {
    "cw2 ipot": (losses.cw2, IPOT),
    "jw2 ipot": (losses.jw2, IPOT),
    "jw2 debiased": (losses.jw2, (("label_cost", "sqeuclidean"), *DEBIASED)),
}


@slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_hard_cases_are_finite(variant):
    function, options = VARIANTS[variant]
    x, y, labels = single(*draw("clustered", 12, 4, classes=3))
    logits = jnp.asarray(logits_of(np.asarray(x)), jnp.float32)
    point, sure = jnp.full_like(x, 0.7), 2e4 * jax.nn.one_hot(labels, 5) - 1e4
    cases = {
        "plain": (x, y, labels, logits),
        "identical": (x, x, labels, logits),
        "one point": (point, point, labels, 0 * logits),
        "two points": (point, point + 1, labels, logits),
        "collapsed student": (point, y, labels, logits),
        "collapsed teacher": (x, point, labels, logits),
        "at 0": (0 * x, 0 * x, labels, 0 * logits),
        "singletons": (x, y, jnp.arange(12), logits),
        "one class": (x, y, 0 * labels, logits),
        "dead": (x.at[:, 1:].set(0.7), y.at[:, 1:].set(0.7), labels, logits),
        "small": (1e-4 * x, 1e-4 * y, labels, logits),
        "large": (1e4 * x, 1e4 * y, labels, logits),
        "outlier": (x.at[0].multiply(1e4), y, labels, logits),
        "sure": (x, y, labels, sure),
    }
    cases["nan"] = (x.at[1, 1].set(jnp.nan), y, labels, logits)
    for case, (z_s, z_t, c, h) in cases.items():
        rest = (c,) if function is losses.cw2 else (h, -h)
        value, _, grads = run(function, z_s, z_t, *rest, options=options)
        assert np.isfinite(value) == (case != "nan"), case
        assert case == "nan" or all(np.isfinite(g).all() for g in grads), case


@slow
def test_divergence_of_one_sample_in_bf16_and_under_vmap():
    options = (("beta", 3.0), ("label_cost", "sqeuclidean"), *DEBIASED)
    grad = compiled(losses.jw2, options)
    x, y, _ = draw("clustered", 24, 16, classes=3)
    arrays = single(x, y, logits_of(x), logits_of(y))
    (value, _), grads = grad(*(a[:1].astype(jnp.bfloat16) for a in arrays))
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)
    pairs = [arrays, [2 * a[::-1] for a in arrays]]
    stacked = [jnp.stack(both) for both in zip(*pairs, strict=True)]
    _, together = jax.vmap(grad)(*stacked)
    for k, pair in enumerate(pairs):
        for batched, alone in zip(together, grad(*pair)[1], strict=True):
            atol = 1e-4 * np.abs(alone).max()
            np.testing.assert_allclose(batched[k], alone, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
@pytest.mark.parametrize("epsilon", [1.5, 10.0])
def test_a_large_epsilon_of_collapsed_clouds_is_zero(solver, epsilon):
    """The smallest number that is no zero, divided by it, was one."""
    z = jnp.ones((16, 4))
    value, gradient = jax.value_and_grad(losses.w2)(z, z, solver=solver, epsilon=epsilon)
    assert value == 0 and (gradient == 0).all()
