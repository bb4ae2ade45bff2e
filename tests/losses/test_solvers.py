"""Which solver runs where, and that each does under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import draw
from jax.sharding import AxisType, PartitionSpec

from kd2m_jax import Outputs, losses
from kd2m_jax.internal import Unsaid, for_cpu

NAMES = ("w2", "cw2", "jw2")
names = pytest.mark.parametrize("name", NAMES)
# Compiling is what these wait for: one loss with the fast tests.
first = pytest.mark.parametrize(
    "name", ["w2", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)


def arguments(name, n=24, d=6, seed=0):
    x, y, labels = draw("clustered", n, d, seed=seed)
    logits = np.random.default_rng(seed).normal(size=(2, n, 5))
    given = (x, y, *(logits if name == "jw2" else ()))
    given = [jnp.asarray(a, jnp.float32) for a in given]
    return [*given, jnp.asarray(labels)] if name == "cw2" else given


def both(name, solver, *, has_aux=False, **options):
    function = functools.partial(getattr(losses, name), solver=solver, has_aux=has_aux, **options)
    return jax.value_and_grad(function, argnums=(0, 1), has_aux=has_aux)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def check_close(tree, expected, rtol=1e-3):
    def close(a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-4 * np.abs(b).max())

    jax.tree.map(close, tree, expected)


@first
def test_auto_is_exact_on_the_cpu(name):
    given = arguments(name)
    (value, info), grads = both(name, "auto", has_aux=True)(*given)
    (expected, its_info), its_grads = both(name, "exact", has_aux=True)(*given)
    check_close((value, grads), (expected, its_grads), rtol=1e-5)
    np.testing.assert_array_equal(info.coupling, its_info.coupling)
    assert info.converged and its_info.converged and info.n_iters == its_info.n_iters == 0
    check_close(both(name, "auto")(*given), (expected, its_grads), rtol=1e-5)
    assert its_info.coupling.max() > 0 and (its_info.coupling > 0).sum() == 24


@pytest.mark.slow
def test_auto_is_sinkhorn_where_it_has_to_be():
    x, y = arguments("w2")
    assert losses.w2(x, y[:20], solver="auto") == losses.w2(x, y[:20], solver="sinkhorn")
    divergence = losses.w2(x, y, solver="auto", debiased=True)
    assert divergence == losses.w2(x, y, solver="sinkhorn", debiased=True)


@pytest.mark.parametrize("name", ["w2", "cw2"])
def test_a_program_has_the_solver_of_its_own_platform(name):
    """Sinkhorn takes exponentials, a search does not."""
    counts = {}
    for solver in ("auto", "exact", "sinkhorn"):
        for platform in ("cpu", "cuda", "tpu"):
            traced = jax.jit(both(name, solver)).trace(*arguments(name))
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            counts[solver, platform] = text.count("stablehlo.exponential")
    assert counts["auto", "cpu"] == counts["exact", "cpu"] == counts["exact", "tpu"] == 0
    for platform in ("cuda", "tpu"):
        assert counts["auto", platform] == counts["sinkhorn", platform] > 0


@names
def test_no_matrix_is_kept_for_the_gradient(name):
    n = 64
    function = functools.partial(getattr(losses, name), solver="auto")
    kept = jax.eval_shape(lambda *given: jax.vjp(function, *given)[1], *arguments(name, n))
    assert max((leaf.size for leaf in jax.tree.leaves(kept)), default=0) < n * n


@pytest.mark.slow
@names
def test_memory_of_the_exact_loss(name):
    """In matrices of n x n: one of costs, padded or masked for the classes."""
    n = 1024
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(name, n)]
    compiled = jax.jit(both(name, "auto")).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * 4 * n * n


@pytest.mark.slow
def test_the_gradient_of_a_teacher_that_all_devices_share():
    """Each device has a student of its own: the teacher's gradients add up, once."""
    students, y = jnp.stack([arguments("w2", seed=s)[0] for s in range(4)]), arguments("w2")[1]
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("i"), PartitionSpec())
    for solver in ("auto", "exact", "sinkhorn"):
        slope = jax.grad(lambda y, x, s=solver: losses.w2(x, y, solver=s))
        shared = jax.shard_map(
            lambda x, y, g=slope: g(y, x[0]), mesh=mesh, in_specs=specs, out_specs=specs[1]
        )
        check_close(jax.jit(shared)(students, y), sum(slope(y, x) for x in students))


@pytest.mark.slow
@first
def test_transformations_of_auto(name):
    problems = [arguments(name, seed=seed) for seed in range(4)]
    run = both(name, "auto")
    expected, batch = stack([run(*given) for given in problems]), stack(problems)
    check_close(jax.jit(jax.vmap(run))(*batch), expected, rtol=1e-5)
    check_close(jax.pmap(run)(*batch), expected, rtol=1e-5)
    check_close(jax.lax.map(lambda given: run(*given), tuple(batch)), expected, rtol=1e-5)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, PartitionSpec()) for a in problems[0]]
        alone = jax.tree.map(lambda a: a[0], expected)
        check_close(jax.jit(run)(*placed), alone, rtol=1e-5)


@names
def test_far_from_zero_the_exact_loss_keeps_its_digits(name):
    """Norms would hide what is left of two clouds that are small beside where they are."""
    given = arguments(name)
    near = [1e-2 * a if a.dtype == jnp.float32 else a for a in given]
    run = functools.partial(getattr(losses, name), solver="exact")
    moved = [near[0] + 64.0, near[1] + 64.0, *near[2:]]
    rounded = [moved[0] - 64.0, moved[1] - 64.0, *near[2:]]  # what float32 keeps of them there
    np.testing.assert_allclose(run(*moved), run(*rounded), rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "w2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("cw2:rotation=true", "jw2+w2@logits")),
    ],
)
def test_what_a_cpu_alone_will_run_is_the_same_to_the_bit(name):
    x, y, *logits = (jnp.asarray(a) for a in arguments("jw2"))
    labels = arguments("cw2")[2]

    def found(metric):
        both = jax.value_and_grad(lambda x, h: metric(Outputs(x, h), Outputs(y, logits[1]), labels))
        return jax.jit(both).trace(x, logits[0])

    metric = losses.get_metric(name)
    here = for_cpu(metric)
    assert here != metric and here.label == metric.label and here.needs == metric.needs
    known, decided_later = found(here), found(metric)
    assert "platform_index" in str(decided_later.jaxpr)
    if "rotation" not in name:  # whose polar factors are chosen by platform as well
        assert "platform_index" not in str(known.jaxpr)
    values = [each.lower().compile()(x, logits[0]) for each in (known, decided_later)]
    jax.tree.map(np.testing.assert_array_equal, *values)


@pytest.mark.parametrize(
    ("metric", "rows", "given"),
    [
        ("w2", 20, {}),
        ("w2:debiased=true", 24, {}),
        pytest.param(
            "cw2:rotation=true", 24, {"where": np.arange(24) < 17}, marks=pytest.mark.slow
        ),
        pytest.param("cw2", 24, {"labels_t": np.arange(24) % 4}, marks=pytest.mark.slow),
    ],
)
def test_a_cpu_takes_what_auto_takes(metric, rows, given):
    """Sinkhorn where the clouds differ in size, say."""
    x, y, labels = arguments("cw2")
    of = lambda metric: metric(Outputs(x), Outputs(y[:rows]), labels, **given)  # noqa: E731
    assert of(for_cpu(metric)) == of(losses.get_metric(metric))


def test_a_sum_for_a_cpu_has_the_names_and_weights_that_it_had():
    x, y = arguments("w2")
    metric = losses.get_metric("w2:epsilon=0.1+l2", weights=[0.5, 2.0])
    here = for_cpu(metric)
    parts = [m.parts(Outputs(x), Outputs(y)) for m in (here, metric)]
    assert parts[0] == parts[1] and parts[0].keys() == {"w2:epsilon=0.1", "l2"}
    assert here.weights == metric.weights


def test_what_leaves_no_choice_is_the_same_for_a_cpu():
    chosen = losses.get_metric("w2", solver="auto")
    for metric in (chosen, losses.get_metric("w2", solver="sinkhorn"), losses.get_metric("l2")):
        assert for_cpu(metric) == metric
    assert for_cpu("none") is for_cpu(None) is None
    assert for_cpu(arguments) is arguments  # a function of the caller's own
    assert for_cpu(losses.jw2) == for_cpu("jw2")
    unsaid = losses.Metric("w2", options=(("solver", Unsaid("sinkhorn")),))
    assert for_cpu(unsaid) == unsaid
