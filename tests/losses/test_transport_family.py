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

kinds = pytest.mark.parametrize("kind", KINDS)
shapes = pytest.mark.parametrize(("n", "d", "classes"), [(40, 96, 2), (96, 12, 7), (120, 32, 100)])
ipot = {"solver": "ipot"}


def single(*arrays):
    return [jnp.asarray(a, jnp.float32 if a.dtype.kind == "f" else jnp.int32) for a in arrays]


def logits_of(x, classes=5, seed=1):
    return x @ np.random.default_rng(seed).normal(size=(x.shape[1], classes)) / x.shape[1] ** 0.5


def other_frequencies(y, labels, m):
    """A bank of m teacher features in which the last classes are the commonest."""
    p = (labels + 1) / (labels + 1).sum()
    return y[np.random.default_rng(1).choice(len(y), m, p=p)]


def check_plan(info, rows, columns):
    plan = np.asarray(info.coupling, np.float64)
    assert bool(info.converged)
    assert plan.min() >= 0
    np.testing.assert_allclose(plan.sum(1), rows, rtol=1e-5)
    assert np.abs(plan.sum(0) - columns).sum() < 1e-3
    return plan


# --- IPOT -------------------------------------------------------------------------------------


@kinds
@shapes
def test_ipot_is_exact(kind, n, d, classes):
    x, y, labels = draw(kind, n, d, classes=classes)
    cost, same = oracles.distances(x, y), labels[:, None] == labels
    value, info = losses.w2(*single(x, y), **ipot, has_aux=True)
    check_plan(info, np.full(n, 1 / n), 1 / n)
    np.testing.assert_allclose(value, oracles.w2(x, y), rtol=2e-3)
    assert info.n_iters < 200
    value, info = losses.cw2(*single(x, y, labels), **ipot, has_aux=True)
    weights = 1 / (len(np.unique(labels)) * same.sum(1))
    plan = check_plan(info, weights, weights)
    assert plan[~same].max(initial=0) == 0
    np.testing.assert_allclose((plan * cost).sum(), value, rtol=1e-4)
    np.testing.assert_allclose(value, oracles.by_class(oracles.w2, x, y, labels), rtol=2e-3)


@pytest.mark.parametrize("kind", ["clustered", "nearly matched", "power-law"])
@pytest.mark.parametrize("m", [40, 64])
def test_ipot_moves_mass_between_clusters(kind, m):
    """Where the first dual bound is a tenth of the optimum, and Sinkhorn is lost."""
    x, y, labels = draw(kind, 64, 16, classes=5)
    y = other_frequencies(y, labels, m)
    value, info = losses.w2(*single(x, y), **ipot, has_aux=True)
    check_plan(info, np.full(64, 1 / 64), 1 / m)
    np.testing.assert_allclose(value, oracles.w2(x, y), rtol=2e-3)


@pytest.mark.parametrize("label_cost", ["cross_entropy", "kl", "sqeuclidean"])
def test_ipot_of_a_joint_cost(label_cost):
    x, y, _ = draw("clustered", 48, 16)
    arrays = x, y[:32], logits_of(x), logits_of(y[:32], seed=2)
    expected = oracles.jw2(*arrays, beta=2.0, kind=label_cost)
    value = losses.jw2(*single(*arrays), beta=2.0, label_cost=label_cost, **ipot)
    np.testing.assert_allclose(value, expected, rtol=2e-3)


@pytest.mark.parametrize("kind", ["gaussian", "nearly matched"])
def test_ipot_gradient_holds_its_plan_constant(kind):
    x, y, labels = draw(kind, 64, 16, classes=4)
    for function, arrays in ((losses.w2, (x, y)), (losses.cw2, (x, y, labels))):
        arrays = single(*arrays)
        plan = np.asarray(function(*arrays, **ipot, has_aux=True)[1].coupling, np.float64)
        grads = jax.grad(functools.partial(function, **ipot), argnums=(0, 1))(*arrays)
        for grad, (p, z, other) in zip(grads, ((plan, x, y), (plan.T, y, x)), strict=True):
            expected = 2 * (p.sum(1)[:, None] * z - p @ other)
            atol = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=atol)


@kinds
def test_solvers_meet_the_exact_cost(kind):
    x, y, _ = draw(kind, 40, 24)
    exact = losses.w2(*single(x, y), solver="exact")
    np.testing.assert_allclose(exact, oracles.w2(x, y), rtol=1e-4)
    for epsilon, rtol in ((0.02, 2e-2), (0.002, 2e-3)):  # the entropic bias goes with epsilon
        np.testing.assert_allclose(losses.w2(*single(x, y), epsilon=epsilon), exact, rtol=rtol)
    for epsilon in (0.1, 0.003):  # the proximal step leaves none
        value = losses.w2(*single(x, y), epsilon=epsilon, **ipot)
        np.testing.assert_allclose(value, exact, rtol=2e-3)


def test_the_lohit_preset():
    x, y, _ = draw("clustered", 24, 8)
    out_s, out_t = (Outputs(z, None) for z in single(x, y))
    assert losses.get_metric("lohit")(out_s, out_t) == losses.w2(*single(x, y), **ipot)
    assert "no reproduction" in losses.METRICS["lohit"].source


# --- The Sinkhorn divergence ------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("epsilon", [0.02, 0.3])
def test_divergence(kind, epsilon):
    x, y, labels = draw(kind, 36, 16, classes=3)
    x, y = 0.1 * x, 0.1 * y  # epsilon is relative, so the unit of the features is no matter
    cost = oracles.distances(x, y)
    check = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-6 * cost.mean())
    reg = epsilon * transport.scale(cost)
    value, info = losses.w2(*single(x, y), epsilon=epsilon, debiased=True, has_aux=True)
    check(value, transport.divergence(x, y, reg))
    check_plan(info, np.full(36, 1 / 36), 1 / 36)
    bank = losses.w2(*single(x, y[:20]), epsilon=epsilon, debiased=True)
    check(bank, transport.divergence(x, y[:20], epsilon * transport.scale(cost[:, :20])))
    # One epsilon for all classes.
    blocks = [cost[np.ix_(labels == c, labels == c)] for c in range(3)]
    by = functools.partial(transport.divergence, reg=epsilon * transport.scale(*blocks))
    value = losses.cw2(*single(x, y, labels), epsilon=epsilon, debiased=True)
    check(value, oracles.by_class(by, x, y, labels))
    # The joint cost is a squared distance between features and logits, side by side.
    h_s, h_t = logits_of(x), logits_of(y, seed=2)
    wide = [np.hstack([z, 3**0.5 * h]) for z, h in ((x, h_s), (y, h_t))]
    options = {"beta": 3.0, "label_cost": "sqeuclidean", "epsilon": epsilon, "debiased": True}
    reg = epsilon * transport.scale(oracles.distances(*wide))
    check(losses.jw2(*single(x, y, h_s, h_t), **options), transport.divergence(*wide, reg))


@kinds
@shapes
def test_divergence_is_within_one_percent_of_exact(kind, n, d, classes):
    x, y, labels = draw(kind, n, d, classes=classes)
    value = losses.w2(*single(x, y), debiased=True)
    np.testing.assert_allclose(value, oracles.w2(x, y), rtol=1e-2)
    value = losses.cw2(*single(x, y, labels), debiased=True)
    np.testing.assert_allclose(value, oracles.by_class(oracles.w2, x, y, labels), rtol=1e-2)


def test_divergence_at_and_near_equality():
    x, y, labels = draw("clustered", 36, 16, classes=3)
    spread = oracles.distances(x, x).mean()
    for epsilon in (0.01, 1.0):
        for function, rest in ((losses.w2, ()), (losses.cw2, (labels,))):
            call = functools.partial(function, epsilon=epsilon, debiased=True)
            value, grads = jax.value_and_grad(call, argnums=(0, 1))(*single(x, x, *rest))
            assert abs(value) <= 1e-6 * spread
            assert max(np.abs(g).max() for g in grads) <= 1e-5 * spread**0.5
            for step in (1e-1, 1e-2, 1e-3, 1e-5):
                near = single(x + step * (y - x), x, *rest)
                assert call(*near) >= -1e-6 * spread


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_divergence_gradient_is_that_of_its_value(epsilon):
    """Through both arguments of the self terms; epsilon's scale is a constant."""
    x, y, labels = draw("power-law", 24, 6, classes=3)
    cost = oracles.distances(x, y)
    blocks = [cost[np.ix_(labels == c, labels == c)] for c in range(3)]
    cases = [(losses.w2, (), (cost,)), (losses.cw2, (labels,), blocks)]
    for function, rest, costs in cases:
        reg = epsilon * transport.scale(*costs)
        call = functools.partial(function, epsilon=epsilon, debiased=True)
        grads = jax.grad(call, argnums=(0, 1))(*single(x, y, *rest))
        for k, grad in enumerate(grads):
            for seed in range(2):
                direction = np.random.default_rng(seed).normal(size=x.shape)

                def along(z, k=k, rest=rest, reg=reg):
                    pair = (z, y) if k == 0 else (x, z)
                    if rest:
                        by = functools.partial(transport.divergence, reg=reg)
                        return oracles.by_class(by, *pair, *rest)
                    return transport.divergence(*pair, reg)

                expected = oracles.directional_derivative(along, (x, y)[k], direction, 1e-4)
                largest = np.linalg.norm(grad) * np.linalg.norm(direction)
                np.testing.assert_allclose(
                    (np.asarray(grad) * direction).sum(), expected, rtol=1e-2, atol=2e-3 * largest
                )


def test_divergence_refuses_what_it_cannot_compare():
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

KEY = jax.random.key(0)


@kinds
@pytest.mark.parametrize(("n", "m"), [(48, 48), (48, 30), (30, 48), (7, 1)])
def test_sw2_in_one_dimension_is_w2(kind, n, m):
    x, y, _ = draw(kind, 48, 1)
    x, y = x[:n], y[:m]
    value, (grad, _) = jax.value_and_grad(losses.sw2, argnums=(0, 1))(*single(x, y), key=KEY)
    expected = ot.wasserstein_1d(x[:, 0], y[:, 0], p=2)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(value, losses.w2(*single(x, y), **ipot), rtol=2e-3)
    plan = ot.emd_1d(x[:, 0], y[:, 0])  # sorted pairing
    gradient = 2 * (plan.sum(1)[:, None] * x - plan @ y)
    np.testing.assert_allclose(grad, gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max())


@kinds
def test_sw2_against_pot(kind):
    x, y, _ = draw(kind, 48, 6)
    for bank in (y, y[:30]):
        value = losses.sw2(*single(x, bank), projections=20_000, key=KEY)
        np.testing.assert_allclose(value, transport.sliced(x, bank), rtol=5e-2)


def test_sw2_scale_and_directions():
    x, y, _ = draw("clustered", 40, 8)
    x, y = single(x, y)
    moved = losses.sw2(x, x + 2.0, projections=20_000, key=KEY)
    np.testing.assert_allclose(8 * moved, losses.w2(x, x + 2.0, solver="exact"), rtol=3e-2)
    many = losses.sw2(x, y, projections=20_000, key=KEY)
    assert 8 * many <= losses.w2(x, y, solver="exact")
    few = [losses.sw2(x, y, key=key) for key in jax.random.split(KEY, 32)]
    assert np.ptp(few) > 0
    standard_error = np.std(few) / 32**0.5
    assert abs(np.mean(few) - many) < 4 * standard_error + 0.02 * many
    assert losses.sw2(x, y, key=KEY) == losses.sw2(x, y, key=jax.random.key(0))
    assert losses.sw2(x, x, key=KEY) == losses.sw2(x[::-1], x, key=KEY) == 0
    with pytest.raises(ValueError, match="give it a key"):
        losses.sw2(x, y)
    with pytest.raises(ValueError, match="projections must be an integer >= 1"):
        losses.sw2(x, y, projections=0, key=KEY)


# --- Gromov -----------------------------------------------------------------------------------


@kinds
def test_gw2_is_the_sum_it_claims_and_no_worse_than_pot(kind):
    x, y, _ = draw(kind, 20, 6)
    y = np.hstack([y, 0.5 * y[:, :3]])
    for bank in (y, y[:14]):
        value, info = losses.gw2(*single(x, bank), has_aux=True)
        plan = check_plan(info, np.full(20, 1 / 20), 1 / len(bank))
        objective = transport.gromov_objective(x, bank, plan)
        np.testing.assert_allclose(value, objective, rtol=1e-3)
        # Local minima both: within 10% of POT's from the product, better from the same start.
        assert value <= 1.1 * transport.gromov(x, bank)
    x, y, _ = draw(kind, 64, 16, classes=5)
    eye = np.eye(64) / 64
    value = losses.gw2(*single(x, y))
    assert value <= transport.gromov_objective(x, y, eye) * (1 + 1e-4)
    for start in (None, eye, 0.9 / 64**2 + 0.1 * eye):
        assert value <= 1.02 * transport.gromov(x, y, start)


def test_gw2_gradient_holds_its_plan_constant():
    x, y, _ = draw("clustered", 16, 4)
    y = np.hstack([y, 0.3 * y])
    for bank in (y, y[:10]):
        _, info = losses.gw2(*single(x, bank), has_aux=True)
        plan = np.asarray(info.coupling, np.float64)
        grads = jax.grad(losses.gw2, argnums=(0, 1))(*single(x, bank))
        for k, grad in enumerate(grads):
            for seed in range(2):
                direction = np.random.default_rng(seed).normal(size=grad.shape)

                def along(z, k=k, plan=plan, bank=bank):
                    pair = (z, bank) if k == 0 else (x, z)
                    return transport.gromov_objective(*pair, plan)

                expected = oracles.directional_derivative(along, (x, bank)[k], direction)
                largest = np.linalg.norm(grad) * np.linalg.norm(direction)
                np.testing.assert_allclose(
                    (np.asarray(grad) * direction).sum(), expected, rtol=1e-2, atol=1e-3 * largest
                )


def test_gw2_does_not_see_where_the_clouds_are():
    x, y, _ = draw("clustered", 32, 6)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    spread = oracles.distances(x, x).mean()
    wide = np.hstack([x, np.zeros((32, 3))]) @ turn + 5
    order = np.random.default_rng(1).permutation(32)
    for congruent in (x, wide, wide[order], -x):
        assert abs(losses.gw2(*single(x, congruent))) <= 1e-5 * spread
    value = losses.gw2(*single(x, y))
    np.testing.assert_allclose(losses.gw2(*single(x + 3, -y)), value, rtol=1e-3)
    np.testing.assert_allclose(losses.gw2(*single(x[order], y[order])), value, rtol=1e-3)
    np.testing.assert_allclose(losses.gw2(*single(1e3 * x, 1e3 * y)), 1e6 * value, rtol=1e-3)
    np.testing.assert_allclose(losses.gw2(*single(2 * x, x)), spread_gap(x), rtol=1e-3)


def spread_gap(x):
    """Of a cloud and itself twice as large: no plan brings the distances nearer than |x - x'|."""
    return oracles.distances(x, x).mean()


# --- One is the limit of another --------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"solver": "exact"}, ipot], ids=str)
def test_jw2_without_label_cost_is_w2(options):
    x, y, _ = draw("clustered", 24, 8)
    arrays = single(x, y, logits_of(x), logits_of(y))
    value = losses.jw2(*arrays, beta=0.0, **options)
    np.testing.assert_allclose(value, losses.w2(*arrays[:2], **options), rtol=1e-5)


@kinds
@pytest.mark.parametrize("label_cost", ["kl", "sqeuclidean"])
def test_jw2_of_certain_outputs_is_cw2(kind, label_cost):
    """Where labels are predicted for sure and cost much, mass stays within the class."""
    x, y, labels = draw(kind, 40, 8, classes=4)  # ten samples a class
    logits = 50 * np.eye(4)[labels]
    for options, rtol in (({"solver": "exact"}, 1e-4), (ipot, 2e-3), ({}, 2e-2)):
        value = losses.jw2(
            *single(x, y, logits, logits), beta=1e3, label_cost=label_cost, **options
        )
        np.testing.assert_allclose(
            value, losses.cw2(*single(x, y, labels), solver="exact"), rtol=rtol
        )


def test_classes_of_one_sample_leave_the_pairs():
    x, y, _ = draw("power-law", 24, 8)
    expected = losses.l2(*single(x, y))
    alone = jnp.arange(24)
    for options in ({}, ipot, {"solver": "exact"}, {"debiased": True}):
        np.testing.assert_allclose(losses.cw2(*single(x, y), alone, **options), expected, rtol=1e-4)
    value = losses.gaussian_cw2(*single(x, y), alone, covariance="diagonal")
    np.testing.assert_allclose(value, expected, rtol=1e-4)


# --- Numerics: what the walk over the catalogue does not reach ---------------------------------

VARIANTS = {
    "w2 ipot": (losses.w2, ipot),
    "cw2 ipot": (losses.cw2, ipot),
    "jw2 ipot": (losses.jw2, ipot),
    "cw2 debiased": (losses.cw2, {"debiased": True}),
    "jw2 debiased": (losses.jw2, {"debiased": True, "label_cost": "sqeuclidean"}),
    "sw2": (losses.sw2, {"key": KEY}),
    "gw2": (losses.gw2, {}),
}


def arguments(function, x, y, labels, logits):
    return {losses.cw2: (x, y, labels), losses.jw2: (x, y, logits, -logits)}.get(function, (x, y))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "d"), [(12, 4), (12, 30)])
def test_hard_cases_are_finite(variant, n, d):
    function, options = VARIANTS[variant]
    x, y, labels = single(*draw("clustered", n, d, classes=3))
    logits = jnp.asarray(logits_of(np.asarray(x, np.float64)), jnp.float32)
    point, sure = jnp.full_like(x, 0.7), 2e4 * jax.nn.one_hot(labels, 5) - 1e4
    cases = {
        "plain": (x, y, labels, logits),
        "identical": (x, x, labels, logits),
        "one point": (point, point, labels, 0 * logits),
        "two points": (point, point + 1, labels, logits),
        "collapsed student": (point, y, labels, logits),
        "collapsed teacher": (x, point, labels, logits),
        "at 0": (0 * x, 0 * x, labels, 0 * logits),
        "singletons": (x, y, jnp.arange(n), logits),
        "one class": (x, y, 0 * labels, logits),
        "dead": (x.at[:, 1:].set(0.7), y.at[:, 1:].set(0.7), labels, logits),
        "small": (1e-4 * x, 1e-4 * y, labels, logits),
        "large": (1e4 * x, 1e4 * y, labels, logits),
        "outlier": (x.at[0].multiply(1e4), y, labels, logits),
        "sure": (x, y, labels, sure),
    }
    run = jax.jit(jax.value_and_grad(functools.partial(function, **options), argnums=(0, 1)))
    for case, arrays in cases.items():
        value, grads = run(*arguments(function, *arrays))
        assert np.isfinite(value), case
        assert all(np.isfinite(g).all() for g in grads), case
        if function is not losses.jw2:  # whose rounding is that of its logits too
            assert value >= -1e-6 * (oracles.distances(*arrays[:2]).mean() + 1e-30), case
    broken = run(*arguments(function, x.at[1, 1].set(jnp.nan), y, labels, logits))[0]
    assert not np.isfinite(broken)


@pytest.mark.parametrize("variant", ["jw2 ipot", "jw2 debiased", "gw2", "sw2"])
def test_one_sample_bf16_and_vmap(variant):
    function, options = VARIANTS[variant]
    call = functools.partial(function, **options)
    x, y, labels = single(*draw("clustered", 12, 6, classes=3))
    logits = jnp.asarray(logits_of(np.asarray(x, np.float64)), jnp.float32)
    one = arguments(function, x[:1], y[:1], labels[:1], logits[:1])
    value, grad = jax.value_and_grad(call)(*one)
    assert np.isfinite(value) and np.isfinite(grad).all()
    arrays = arguments(function, x, y, labels, logits)
    half = [a.astype(jnp.bfloat16) for a in arrays]
    assert call(*half).dtype == jnp.float32
    pairs = [arrays, tuple(2 * a for a in arrays)]
    stacked = [jnp.stack(both) for both in zip(*pairs, strict=True)]
    grads = jax.vmap(jax.grad(call))(*stacked)
    for together, alone in zip(grads, (jax.grad(call)(*p) for p in pairs), strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4 * np.abs(alone).max())
