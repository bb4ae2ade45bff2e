"""Every entry of the catalogue on arrays, groups, dtypes and options that nobody chose.

Hypothesis draws them and shrinks what fails; the laws are those that `numerics` lists. Each program
is compiled once per metric, options and dtype, which is where the time goes: the fast suite draws
few of those, the slow one all.
"""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import collapsed, compiled, law, parameters_of, scaled
from walk import VARIANTS, used

from kd2m_jax import Outputs, losses

N, D, K = 6, 3, 4
# One value of each kind of option that a metric may have, beside those that `walk` lists.
NUMBERS = {
    "epsilon": (0.1,),
    "beta": (0.0, 5.0),
    "shrinkage": (1.0,),
    "temperature": (1.0, 20.0),
    "bandwidth": (0.5, "median"),
    "degree": (1, 3),
    "offset": (0.0,),
    "projections": (16,),
    "frequencies": (8,),
    "mean_coef": (1.0,),
    "target_coef": (0.0,),
    "n_iters": (3,),
}
numbers = st.floats(-4, 4, width=16, allow_subnormal=False)


def array(*shape):
    return arrays.arrays(np.float32, shape, elements=numbers)


@st.composite
def networks(draw):
    """Student, teacher and labels: anything from all zeros to one outlier, or nearly equal."""
    one = st.tuples(array(N, D), array(N, K), array(N, 2, 2, 3))
    student = draw(one)
    if draw(st.booleans()):
        teacher = draw(one)
    else:
        step = draw(st.sampled_from([0.0, 1e-3, 0.1]))
        teacher = [a + step * draw(array(*a.shape)) for a in student]
    # Exact powers of two, so that the laws of scale hold to rounding.
    unit = 2.0 ** draw(st.integers(-10, 10))
    pair = [Outputs(unit * z, h, (unit * maps,)) for z, h, maps in (student, teacher)]
    labels = draw(arrays.arrays(np.int32, N, elements=st.integers(0, K - 1)))
    return (*pair, labels), draw(st.permutations(range(N)))


def options_of(name):
    """Return what may be set of a metric: nothing, what the walk sets, or one number."""
    info = losses.METRICS[name]
    free = (info.function.__wrapped__.__kwdefaults__ or {}).keys() - info.options.keys()
    if "kernel" in info.options:  # an option of another kernel changes nothing
        its_own = {"rbf": {"bandwidth"}, "polynomial": {"degree", "offset"}}
        free &= its_own.get(info.options["kernel"], set())
    walked = [options for known, options in VARIANTS if known == name]
    return walked + [{key: value} for key in sorted(free) for value in NUMBERS.get(key, ())]


def call(metric, student, teacher, labels):
    value, grads = compiled(metric)((student, teacher), jnp.asarray(labels))
    return float(value), jax.tree.map(lambda a: np.asarray(a, np.float64), grads)


def is_a_point(outputs):
    """Whether all rows are one, as far as half precision sees."""
    z = np.asarray(outputs.features, np.float64)
    return np.ptp(z, axis=0).max() <= 1e-2 * np.abs(z).max()


def generic(outputs, seed):
    """Return features with noise of a quarter of their scale: no two couplings are as good."""
    z = outputs.features
    noise = np.random.default_rng(seed).normal(size=z.shape).astype(np.float32)
    unit = 2.0 ** np.ceil(np.log2(max(np.abs(np.asarray(z, np.float32)).max(), 1e-3)))
    return outputs._replace(features=(z + unit / 4 * noise).astype(z.dtype))


def check(metric, dtype, drawn):
    """All laws on one drawing."""
    (student, teacher, labels), order = drawn
    student, teacher = jax.tree.map(lambda a: jnp.asarray(a, dtype), (student, teacher))
    known = law(metric)
    if not isinstance(dict(metric.options).get("bandwidth", "mean"), str):
        known = known._replace(power=None)  # a width in the unit of the features
    if "shrinkage" in parameters_of(metric) and all(map(is_a_point, (student, teacher))):
        known = known._replace(power=None, moves=False)  # no spread for a ridge to be relative to
    of = functools.partial(call, metric, labels=labels)
    value, grads = of(student, teacher)
    assert np.isfinite(value)
    # A gradient has its array's type, and half precision ends at 65,504.
    sound = (lambda a: ~np.isnan(a)) if dtype == jnp.float16 else np.isfinite
    assert all(sound(leaf).all() for leaf in jax.tree.leaves(grads))
    if dict(metric.options).get("rotation"):
        # A local optimum: where two couplings are as good, the order of the rows decides.
        student, teacher = generic(student, 0), generic(teacher, 1)
        value = of(student, teacher)[0]
    # Rounding is measured by the clouds, not by what is left of them near equality. Iterative
    # plans end within 1% of their optimum.
    size = max(abs(of(collapsed(z), z)[0]) for z in (student, teacher))
    iterative = "solver" in parameters_of(metric)
    rtol = 2e-2 if iterative or metric.name == "gw2" else 1e-3
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-4 * size)
    assert value >= -1e-4 * size
    again = jax.tree.map(lambda a: a[np.array(order)], (student, teacher))
    close(call(metric, *again, labels[np.array(order)])[0], value)
    if known.zero:
        assert of(student, student)[0] <= 1e-4 * size
    if known.symmetric:
        close(of(teacher, student)[0], value)
    if known.power is not None and dtype != jnp.float16:  # which loses digits below 6e-5
        unit = 0.25
        moved = of(*(scaled(z, unit) for z in (student, teacher)))[0]
        close(moved / unit**known.power, value)
    if known.moves and "features" in used(metric) and dtype == jnp.float32:
        step = 2.0 ** np.ceil(np.log2(max(np.abs(student.features).max(), 1e-3)))
        moved = [z._replace(features=z.features + step) for z in (student, teacher)]
        close(of(*moved)[0], value)


def run(name, programs, examples, **settings):
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        **({"derandomize": True} | settings),  # a failure is a change's, not chance's
    )
    @hypothesis.given(st.sampled_from(programs), networks())
    def laws(program, drawn):
        dtype, options = program
        check(losses.get_metric(name, **options), dtype, drawn)

    laws()


@pytest.mark.parametrize("name", losses.METRICS)
def test_laws(name):
    """The same few drawings each time; of what compiles fast, in two programs."""
    programs = [(jnp.float32, {})]
    if name.startswith(("mmd", "cmmd", "kd", "l2", "sw2", "wkd")):
        programs.append((jnp.bfloat16, options_of(name)[-1]))
    run(name, programs, 6, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", losses.METRICS)
def test_laws_on_many_drawings(name):
    """Other drawings each time; a failure prints the line that repeats it."""
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)
    programs = [(dtype, options) for options in options_of(name) for dtype in dtypes]
    run(name, programs, 100)
