"""Every distance against the float64 textbook form: values, couplings and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import KINDS, draw
from reference import oracles

from kd2m_jax import losses

# n < d, n > d, square; 2 classes to as many as there are samples (all singletons).
SHAPES = [(40, 96, 2), (96, 12, 7)]
SHAPES += [pytest.param(*shape, marks=pytest.mark.slow) for shape in ((48, 48, 48), (120, 32, 100))]
TRANSPORT = [SHAPES[0], pytest.param(*SHAPES[1], marks=pytest.mark.slow), *SHAPES[2:]]
shapes = pytest.mark.parametrize(("n", "d", "classes"), SHAPES)
kinds = pytest.mark.parametrize("kind", KINDS)


def logits_of(x, classes=5, seed=1):
    return x @ np.random.default_rng(seed).normal(size=(x.shape[1], classes)) / x.shape[1] ** 0.5


def single(*arrays):
    return [jnp.asarray(a, jnp.float32 if a.dtype.kind == "f" else jnp.int32) for a in arrays]


@kinds
@pytest.mark.parametrize(("n", "d", "classes"), TRANSPORT)
def test_transport_values(kind, n, d, classes):
    x, y, labels = draw(kind, n, d, classes=classes)
    h_s, h_t = logits_of(x), logits_of(y, seed=2)
    cost = oracles.distances(x, y)
    cases = [
        (losses.w2, (x, y), {}, oracles.w2(x, y)),
        (losses.cw2, (x, y, labels), {}, oracles.by_class(oracles.w2, x, y, labels)),
    ] + [
        (
            losses.jw2,
            (x, y, h_s, h_t),
            {"beta": 2.0, "label_cost": label_cost},
            oracles.jw2(x, y, h_s, h_t, beta=2.0, kind=label_cost),
        )
        for label_cost in ("cross_entropy", "kl", "sqeuclidean")
    ]
    for function, arrays, options, expected in cases:
        exact = function(*single(*arrays), solver="exact", **options)
        np.testing.assert_allclose(exact, expected, rtol=1e-3, atol=1e-6 * cost.mean())
        sinkhorn = function(*single(*arrays), solver="sinkhorn", **options)
        # 1% of exact, outright: the slack of epsilon times the mean cost is not needed.
        np.testing.assert_allclose(sinkhorn, expected, rtol=1e-2, atol=1e-5 * cost.mean())


@pytest.mark.parametrize(("n", "m", "wrong"), [(128, 128, 0.02), (128, 128, 0.3), (64, 256, 0.1)])
def test_w2_where_clusters_differ_in_mass(n, m, wrong):
    """Some students sit in a wrong cluster, so that their mass has to go far: Sinkhorn is slow."""
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(10, 64)), rng.integers(0, 10, m)
    placed = np.where(rng.random(n) < wrong, rng.integers(0, 10, n), labels[:n])
    x = centres[placed] + 0.1 * rng.normal(size=(n, 64))
    y = centres[labels] + 0.1 * rng.normal(size=(m, 64))
    value, info = losses.w2(*single(x, y), solver="sinkhorn", has_aux=True)
    # Sinkhorn ends once it shows; then it is the exact plan, or for n != m the proximal one.
    assert info.converged and (info.n_iters == 20 if n == m else info.n_iters > 100)
    np.testing.assert_allclose(value, oracles.w2(x, y), rtol=1e-2)
    assert np.abs(info.coupling.sum(0) - 1 / m).sum() < 1e-3  # the solvers' own limit is half of it


@pytest.mark.parametrize("ratio", [100, 800, 1600])
def test_one_sample_far_out_in_both_clouds(ratio):
    """It takes nearly all of the mean cost, and was 30% of the value by way of epsilon's scale."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 128, 64)).astype(np.float32)
    x[0] *= ratio
    y[0] = x[0]
    expected = oracles.w2(x.astype(float), y.astype(float))
    for options in ({"solver": "exact"}, {"solver": "sinkhorn"}, {"debiased": True}):
        np.testing.assert_allclose(losses.w2(x, y, **options), expected, rtol=1e-2)


@pytest.mark.parametrize(("n", "m"), [(64, 24), (24, 64)])
def test_w2_between_clouds_of_unequal_size(n, m):
    x, y, _ = draw("gaussian", max(n, m), 16)
    x, y = x[:n], y[:m]
    for solver in ("auto", "sinkhorn"):  # "auto" is Sinkhorn here
        value = losses.w2(*single(x, y), solver=solver)
        np.testing.assert_allclose(value, oracles.w2(x, y), rtol=1e-2)
    expected = oracles.gaussian_w2(x, y)
    np.testing.assert_allclose(losses.gaussian_w2(*single(x, y)), expected, rtol=1e-3)
    expected = oracles.gaussian_kl(x, y, s=oracles.ridge(x, y, 0.1))
    np.testing.assert_allclose(losses.gaussian_kl(*single(x, y)), expected, rtol=5e-3)
    h_s, h_t = logits_of(x), logits_of(y, seed=2)
    expected = oracles.jw2(x, y, h_s, h_t, beta=1.0, kind="cross_entropy")
    value = losses.jw2(*single(x, y, h_s, h_t), solver="sinkhorn")
    np.testing.assert_allclose(value, expected, rtol=1e-2)


def test_small_singular_values_are_kept_in_a_large_batch():
    """A tolerance relative to the clouds' norms lost 0.3% of the value here."""
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(10, 512)), np.arange(512) % 10
    y = centres[labels] + 0.5 * rng.normal(size=(512, 512))
    x = y + 0.5 * rng.normal(size=(512, 512))
    value = losses.gaussian_w2(*single(x, y))
    np.testing.assert_allclose(value, oracles.gaussian_w2(x, y), rtol=1e-3)


@kinds
@shapes
@pytest.mark.parametrize("covariance", ["full", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_gaussian_values(kind, n, d, classes, covariance):
    x, y, labels = draw(kind, n, d, classes=classes)
    args, by = single(x, y), single(x, y, labels)
    w2 = functools.partial(oracles.gaussian_w2, kind=covariance)
    # A distance below 1e-6 of the features' own scale is rounding in float32.
    atol = 1e-6 * ((x**2).sum(1).mean() + (y**2).sum(1).mean())
    value = losses.gaussian_w2(*args, covariance=covariance)
    np.testing.assert_allclose(value, w2(x, y), rtol=1e-3, atol=atol)
    value = losses.gaussian_cw2(*by, covariance=covariance)
    np.testing.assert_allclose(value, oracles.by_class(w2, x, y, labels), rtol=1e-3, atol=atol)
    for direction in ("student_teacher", "teacher_student"):
        for shrinkage in (0.1, 0.01):
            options = {"covariance": covariance, "direction": direction, "shrinkage": shrinkage}
            s = oracles.ridge(x, y, shrinkage)
            kl = functools.partial(oracles.gaussian_kl, s=s, kind=covariance, direction=direction)
            value = losses.gaussian_kl(*args, **options)
            np.testing.assert_allclose(value, kl(x, y), rtol=5e-3)
            value = losses.gaussian_ckl(*by, **options)
            np.testing.assert_allclose(value, oracles.by_class(kl, x, y, labels), rtol=5e-3)


def test_l2_value():
    x, y, _ = draw("gaussian", 32, 8)
    np.testing.assert_allclose(losses.l2(*single(x, y)), ((x - y) ** 2).sum(1).mean(), rtol=1e-6)


@functools.cache
def gradients(function, **options):
    """Compile the gradients in both clouds as one program a shape."""
    return jax.jit(jax.grad(functools.partial(function, **options), argnums=(0, 1)))


def transport_gradient(plan, x, y):
    """``sum_j P_ij 2 (x_i - y_j)``, the gradient of <P, C> with P held constant."""
    return 2 * (plan.sum(1)[:, None] * x - plan @ y)


@kinds
@shapes
def test_exact_transport_gradients_use_the_oracles_coupling(kind, n, d, classes):
    x, y, labels = draw(kind, n, d, classes=classes)
    cases = [
        (losses.w2, (x, y), oracles.plan(oracles.distances(x, y))),
        (losses.cw2, (x, y, labels), oracles.conditional_plan(x, y, labels)),
    ]
    for function, arrays, plan in cases:
        grad_s, grad_t = gradients(function, solver="exact")(*single(*arrays))
        scale = np.abs(transport_gradient(plan, x, y)).max()
        np.testing.assert_allclose(
            grad_s, transport_gradient(plan, x, y), rtol=1e-3, atol=1e-4 * scale
        )
        np.testing.assert_allclose(
            grad_t, transport_gradient(plan.T, y, x), rtol=1e-3, atol=1e-4 * scale
        )


@pytest.mark.slow
@kinds
def test_sinkhorn_gradients_use_their_own_coupling(kind):
    x, y, labels = draw(kind, 96, 24, classes=5)
    for function, arrays in ((losses.w2, (x, y)), (losses.cw2, (x, y, labels))):
        value, info = function(*single(*arrays), solver="sinkhorn", has_aux=True)
        plan = np.asarray(info.coupling, np.float64)
        assert bool(info.converged)
        np.testing.assert_allclose(plan.sum(), 1, rtol=1e-5)
        weights = np.full(96, 1 / 96)
        if function is losses.cw2:
            same = labels[:, None] == labels
            weights = 1 / (5 * same.sum(1))
            assert plan[~same].max() == 0
        np.testing.assert_allclose(plan.sum(1), weights, rtol=1e-4)
        assert np.abs(plan.sum(0) - weights).sum() < 1e-3
        np.testing.assert_allclose(value, (plan * oracles.distances(x, y)).sum(), rtol=1e-4)
        gradient = jax.grad(function)(*single(*arrays), solver="sinkhorn")
        expected = transport_gradient(plan, x, y)
        np.testing.assert_allclose(
            gradient, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
        )


@pytest.mark.slow
@pytest.mark.parametrize("label_cost", ["cross_entropy", "kl", "sqeuclidean"])
@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_jw2_gradients_with_respect_to_features_and_logits(label_cost, solver):
    x, y, _ = draw("clustered", 32, 8)
    arrays = x, y, logits_of(x), logits_of(y, seed=2)
    options = {"beta": 3.0, "label_cost": label_cost, "solver": solver}
    call = functools.partial(losses.jw2, has_aux=True, **options)
    both = jax.jit(jax.value_and_grad(call, argnums=(0, 1, 2, 3), has_aux=True))
    (_, info), grads = both(*single(*arrays))
    plan = np.asarray(info.coupling, np.float64)

    def oracle(arrays):
        cost = oracles.distances(arrays[0], arrays[1])
        return (plan * (cost + 3.0 * oracles.label_cost(arrays[2], arrays[3], label_cost))).sum()

    for k, gradient in enumerate(grads):
        for seed in range(3):
            direction = np.random.default_rng(seed).normal(size=arrays[k].shape)

            def along(a, k=k):
                return oracle([*arrays[:k], a, *arrays[k + 1 :]])

            expected = oracles.directional_derivative(along, arrays[k], direction)
            actual = (np.asarray(gradient) * direction).sum()
            np.testing.assert_allclose(actual, expected, rtol=2e-2)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize(("n", "d", "classes"), [(24, 40, 3), (60, 10, 5)])
@pytest.mark.parametrize("covariance", ["full", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_gaussian_gradients(kind, n, d, classes, covariance):
    x, y, labels = draw(kind, n, d, classes=classes)
    s = oracles.ridge(x, y, 0.1)  # the library's is detached, so it is frozen here
    w2 = functools.partial(oracles.gaussian_w2, kind=covariance)
    kl = functools.partial(oracles.gaussian_kl, s=s, kind=covariance)
    cases = [
        (losses.gaussian_w2, (), w2),
        (losses.gaussian_kl, (), kl),
        (losses.gaussian_cw2, (labels,), functools.partial(oracles.by_class, w2, labels=labels)),
        (losses.gaussian_ckl, (labels,), functools.partial(oracles.by_class, kl, labels=labels)),
    ]
    for function, rest, oracle in cases:
        grads = gradients(function, covariance=covariance)(*single(x, y, *rest))
        for k, gradient in enumerate(np.asarray(g, np.float64) for g in grads):
            # Along the gradient itself, where the derivative is largest, and along noise within
            # the span of the centred batch (the distance has a kink out of it when n < d).
            for seed in range(2):
                cloud = (x, y)[k]
                mix = np.random.default_rng(seed).normal(size=(n, n)) / n
                direction = gradient if seed else mix @ (cloud - cloud.mean(0))
                direction = direction * np.linalg.norm(cloud) / np.linalg.norm(direction)

                def along(a, k=k, oracle=oracle):
                    return oracle(*((a, y) if k == 0 else (x, a)))

                expected = oracles.directional_derivative(along, cloud, direction, 1e-4)
                largest = np.linalg.norm(gradient) * np.linalg.norm(direction)
                np.testing.assert_allclose(
                    (gradient * direction).sum(), expected, rtol=2e-2, atol=2e-3 * largest
                )
