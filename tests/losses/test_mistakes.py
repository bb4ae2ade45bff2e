"""What a user can get wrong is said at trace time: what was expected, what came, what helps."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from walk import batch, used

from kd2m_jax import Outputs, losses

NAN = float("nan")
# The rest of the metrics that take labels runs the same two functions' code.
LABELLED = ["gaussian-cw2", "cmmd-linear", "wkd-l"] + [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("cw2", "gaussian-ckl", "cmmd-rbf", "cmmd-energy", "cmmd-polynomial")
]
Z, H, Y = np.ones((6, 4), np.float32), np.ones((6, 3), np.float32), np.arange(6) % 3


def check(function, arrays, error, *words):
    """Check that the error is raised with these words, bare and inside a user's jit."""
    for call in (function, jax.jit(function)):
        with pytest.raises(error) as caught:
            call(*arrays)
        message = str(caught.value)
        assert [word for word in map(str, words) if word not in message] == [], message
        assert "\n" not in message  # it may be printed by a shell


def with_option(option):
    """``pytest.mark.parametrize`` over the catalogue's functions that take an option."""
    functions = dict.fromkeys(info.function for info in losses.METRICS.values())
    having = [f for f in functions if option in inspect.signature(f).parameters]
    return pytest.mark.parametrize("function", having, ids=lambda f: f.__name__)


def arrays_of(function):
    """Arrays that fit a loss: features, logits, maps and labels of six samples."""
    known = {"z": Z, "logits": H, "maps": np.ones((6, 2, 2, 3), np.float32), "labels": Y}
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [known[name.removesuffix("_s").removesuffix("_t")] for name in names]


def replaced(function, **arrays):
    """`arrays_of`, some by name replaced."""
    fitting = arrays_of(function)
    for name, array in arrays.items():
        fitting[list(inspect.signature(function).parameters).index(name)] = array
    return fitting


@with_option("z_s")
def test_features(function):
    if losses.METRICS.get(function.__name__, losses.METRICS["w2"]).projector:  # no sizes of its own
        arrays = replaced(function, z_s=np.ones((6, 5), np.float32))
        check(function, arrays, ValueError, "5 features", "4", "kd2m_jax.projected", "losses.gw2")
    for which in ("z_s", "z_t"):
        arrays = replaced(function, **{which: Z[:, 0]})
        check(function, arrays, ValueError, which, "[n, d]", "[6]")
        arrays = replaced(function, **{which: Z.reshape(6, 2, 2)})
        check(function, arrays, ValueError, which, "[n, d]", "[6, 2, 2]")
        for empty in (Z[:0], Z[:, :0]):
            arrays = replaced(function, **{which: empty})
            check(function, arrays, ValueError, which, "non-empty", list(empty.shape))
        arrays = replaced(function, **{which: Z.astype(np.int32)})
        check(function, arrays, TypeError, which, "floating", "int32")


@with_option("logits_s")
def test_logits(function):
    arrays = replaced(function, logits_s=np.ones((6, 5), np.float32))
    check(function, arrays, ValueError, "logits_s", "5 classes", "logits_t", "3")
    arrays = replaced(function, logits_t=H[:5])
    check(function, arrays, ValueError, "rows", "6", "5")
    for which in ("logits_s", "logits_t"):
        arrays = replaced(function, **{which: H[:, 0]})
        check(function, arrays, ValueError, which, "[6]")
        arrays = replaced(function, **{which: H.astype(np.int32)})
        check(function, arrays, TypeError, which, "floating", "int32")


@with_option("labels")
def test_labels(function):
    check(function, replaced(function, labels=Y.astype(np.float32)), TypeError, "integer", "float")
    one_hot = np.eye(3, dtype=np.int32)[Y]
    check(
        function, replaced(function, labels=one_hot), ValueError, "[6]", "[6, 3]", "labels.argmax"
    )
    check(function, replaced(function, labels=Y[:5]), ValueError, "labels", "[6]", "[5]")
    # Class 0 for everyone is what argmax would make of a column.
    check(function, replaced(function, labels=Y[:, None]), ValueError, "[6, 1]", "labels[:, 0]")
    # Not only for these can rows not be matched, but for these only by mistake.
    first = next(iter(inspect.signature(function).parameters))
    arrays = replaced(function, **{first: arrays_of(function)[0][:5]})
    check(function, arrays, ValueError, "5", "6", "rows", "same example")


@with_option("labels")
def test_labels_that_no_advice_may_destroy(function):
    def refused(labels, error, *words):
        with pytest.raises(error) as caught:
            function(*replaced(function, labels=labels))
        assert [word for word in words if word not in str(caught.value)] == [], caught.value
        return str(caught.value)

    column = refused(Y[:, None], ValueError, "labels[:, 0]")
    assert "argmax" not in column
    for fractions in (Y + 0.5, np.full((6, 3), 1 / 3)):  # astype(int) would round them
        assert "astype" not in refused(fractions, TypeError, "distributions", "float64")
    # JAX would keep the lower half of each number, so that 2^32 + 1 becomes class 1.
    for wide in (Y + 2**32, -(2**40) * np.ones(6, np.int64), (Y + 2**32).tolist()):
        refused(wide, ValueError, str(int(np.max(wide))), "32 bits", "return_inverse")
    refused(np.array(list("abcabc")), TypeError, "integers")
    small = function(*replaced(function, labels=Y.astype(np.int64)))
    assert small == function(*replaced(function, labels=Y.astype(np.uint8)))
    with jax.enable_x64(True):  # where 64 bits are kept they may be used
        wide = Y + (0 if function is losses.wkd_l else 2**32)
        assert function(*replaced(function, labels=wide)) == small


@pytest.mark.parametrize("metric", [None, *LABELLED])
@pytest.mark.parametrize("label", [-2, 3])
def test_a_label_that_is_no_class_is_not_finite(metric, label):
    """In value and gradient, compiled or not: which class it is taken for cannot be seen."""
    student, teacher, labels = batch(6, logits=3)
    labels = (labels % 3).at[2].set(label)

    def objective(student, labels):
        coef = {"metric": metric, "coef": 1.0}
        return losses.distillation_loss(student, teacher, labels, **coef)[0]

    for given in (labels, np.asarray(labels)):
        for call in (objective, jax.jit(objective)):
            value, grads = jax.value_and_grad(call)(student, given)
            assert np.isnan(value) and np.isnan(grads.logits[2]).any()
    if metric and (label < 0 or metric == "wkd-l"):  # a metric alone knows no largest class
        value, grads = jax.value_and_grad(losses.get_metric(metric))(student, teacher, labels)
        assert np.isnan(value) and any(np.isnan(g).all() for g in jax.tree.leaves(grads))


def test_a_softmax_over_one_class_is_refused():
    one = H[:, :1]
    check(losses.kd, (one, one), ValueError, "kd", "k >= 2", "got 1")
    check(losses.wkd_l, (one, one, Y), ValueError, "wkd_l", "k >= 2", "got 1")
    standardized = functools.partial(losses.kd, standardize=True)
    check(
        standardized, (one.repeat(2, 1), one.repeat(2, 1)), ValueError, "two classes are 1 and -1"
    )
    out = Outputs(Z, one)
    loss = functools.partial(losses.distillation_loss, metric="l2", coef=1.0)
    check(loss, (out, out, 0 * Y), ValueError, "cross-entropy", "k >= 2")
    value, _ = loss(out, out._replace(features=Z + 1), 0 * Y, task_coef=0.0)
    assert value == 4


def test_rows_that_must_be_the_same_example():
    check(losses.l2, (Z[:5], Z), ValueError, "5 rows", "6", "same example")
    jw2 = functools.partial(losses.jw2, logits_s=H, logits_t=H)
    check(jw2, (Z[:5], Z), ValueError, "logits_s", "6", "5")


@with_option("epsilon")
def test_epsilon(function):
    for epsilon in (0, -1.0, NAN):
        wrong = functools.partial(function, epsilon=epsilon)
        check(wrong, arrays_of(function), ValueError, "epsilon must be > 0", epsilon)


@with_option("shrinkage")
def test_shrinkage(function):
    for shrinkage in (0, -0.5, NAN):
        wrong = functools.partial(function, shrinkage=shrinkage)
        check(wrong, arrays_of(function), ValueError, "shrinkage must be > 0", shrinkage)


def test_beta():
    for beta in (-1.0, NAN):
        wrong = functools.partial(losses.jw2, beta=beta)
        check(wrong, arrays_of(losses.jw2), ValueError, "beta must be >= 0", beta)


CHOICES = [
    ("solver", "sinkorn", "did you mean sinkhorn", "exact"),
    ("solver", "emd", "sinkhorn", "exact"),
    ("covariance", "diag", "did you mean diagonal", "full"),
    ("direction", "student-teacher", "did you mean student_teacher"),
    ("label_cost", "crossentropy", "did you mean cross_entropy", "kl", "sqeuclidean"),
    ("kernel", "RBF", "rbf", "linear"),
]


@pytest.mark.parametrize(("option", "wrong", *["words"]), [(c[0], c[1], c[2:]) for c in CHOICES])
def test_choices_name_the_nearest(option, wrong, words):
    found = 0
    for info in losses.METRICS.values():
        if option in inspect.signature(info.function).parameters:
            function = functools.partial(info.function, **{option: wrong})
            check(function, arrays_of(info.function), ValueError, option, repr(wrong), *words)
            found += 1
    assert found


@with_option("solver")
def test_exact_solver_needs_as_many_of_both(function):
    if "labels" in inspect.signature(function).parameters:
        pytest.skip("both sides are the same batch")
    wrong = functools.partial(function, solver="exact")
    arrays = [a[:5] if i % 2 else a for i, a in enumerate(arrays_of(function))]
    check(wrong, arrays, ValueError, "m = n", "n = 6", "m = 5", "sinkhorn")


@pytest.mark.parametrize("name", losses.METRICS)
def test_options_are_static(name):
    """A traced option would fail deep inside, or silently where it is only multiplied."""
    function = losses.METRICS[name].function
    parameters = inspect.signature(function).parameters.values()
    for option in [p.name for p in parameters if isinstance(p.default, float)]:
        with pytest.raises(TypeError, match=f"{option} is a static option"):
            jax.jit(lambda x, o=option: function(*arrays_of(function), **{o: x}))(0.5)


def test_unknown_metric():
    for name, nearest in (
        ("gausian-w2", "gaussian-w2"),
        ("CWW2", "cw2"),
        ("w2@feature", "features"),
        ("jw-2", "jw2"),
    ):
        with pytest.raises(ValueError, match=nearest) as caught:
            losses.get_metric(name)
        assert name.split("@")[-1].lower() in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(", ".join(losses.METRICS))):
        losses.get_metric("zzz")
    with pytest.raises(ValueError, match="did you mean w2"):
        losses.distillation_loss(Outputs(Z, H), Outputs(Z, H), Y, metric="w22", coef=1.0)


def test_unknown_option_and_option_out_of_range():
    with pytest.raises(TypeError, match=r"'jw2' has no option 'betta': did you mean beta"):
        losses.get_metric("jw2", betta=1.0)
    with pytest.raises(TypeError, match=r"'l2' has no option 'epsilon': it has none"):
        losses.get_metric("l2", epsilon=1.0)
    with pytest.raises(TypeError, match="no option 'has_aux'"):  # a metric returns a scalar
        losses.get_metric("w2", has_aux=True)
    # Out of range shows when the metric is made, not when it is first called.
    with pytest.raises(ValueError, match=r"epsilon must be > 0, got -1"):
        losses.get_metric("w2", epsilon=-1)
    with pytest.raises(ValueError, match="did you mean exact"):
        losses.get_metric("cw2", solver="exakt")


@pytest.mark.parametrize("name", losses.METRICS)
def test_what_a_metric_needs_and_does_not_get(name):
    metric, (student, teacher, labels) = losses.get_metric(name), batch(6)
    if "labels" in metric.needs:
        check(lambda s, t: metric(s, t), (student, teacher), ValueError, name, "labels")
    if "key" in metric.needs:
        check(metric, (student, teacher, labels), ValueError, name, "key")
    cases = [(metric, field) for field in used(metric)]
    if "features" in used(metric):
        cases.append((losses.get_metric(name, on="logits"), "logits"))
    for call, field in cases:
        nothing = {field: () if field == "maps" else None}
        for lacking in (
            (student._replace(**nothing), teacher, labels),
            (student, teacher._replace(**nothing), labels),
        ):
            check(call, lacking, ValueError, name, "needs", field)


@pytest.mark.parametrize("weight", ["coef", "task_coef"])
def test_weights(weight):
    out = Outputs(Z, H)
    for value in (-1.0, -1e-9, NAN, np.float32(-2), jnp.asarray(-2.0)):
        weights = {"coef": 1.0, "task_coef": 1.0, weight: value}
        loss = functools.partial(losses.distillation_loss, metric="l2", **weights)
        check(loss, (out, out, Y), ValueError, f"{weight} must be >= 0", value)


def test_the_cross_entropy_needs_logits_and_labels():
    loss = functools.partial(losses.distillation_loss, metric="l2", coef=1.0)
    out = Outputs(Z, H)
    check(loss, (Outputs(Z), out, Y), ValueError, "student", "logits")
    check(loss, (out, out, H[:, :1]), TypeError, "integers", "float32")
    check(loss, (out, out, H[:, :2]), ValueError, "distributions", "[6, 2]")
    check(loss, (out, out, Y[:5]), ValueError, "[6]", "[5]")


def test_maps_as_one_array():
    maps = np.random.default_rng(0).normal(size=(6, 2, 2, 3)).astype(np.float32)
    metric = losses.get_metric("wkd-f")
    expected = metric(Outputs(Z, H, (maps,)), Outputs(Z, H, (2 * maps,)))
    for single in (maps, jnp.asarray(maps), [maps]):
        assert metric(Outputs(Z, H, single), Outputs(Z, H, (2 * maps,))) == expected
    assert jax.jit(metric)(Outputs(Z, H, maps), Outputs(Z, H, 2 * maps)) == expected


def test_what_is_no_metric_and_what_are_no_outputs():
    out = Outputs(Z, H)
    for metric, words in (
        ([losses.get_metric("l2")], ("metric_sum",)),
        (3, ("int",)),
    ):
        with pytest.raises(TypeError) as caught:
            losses.distillation_loss(out, out, Y, metric=metric, coef=1.0)
        assert [word for word in words if word not in str(caught.value)] == [], caught.value
    for wrong, word in ((Z, "[6, 4]"), (jnp.asarray(Z[:2]), "[2, 4]"), ({"features": Z}, "dict")):
        with pytest.raises(TypeError, match=re.escape(word)) as caught:
            losses.get_metric("l2")(wrong, out)
        assert "student" in str(caught.value) and "Outputs(features)" in str(caught.value)
        with pytest.raises(TypeError, match="teacher"):
            losses.distillation_loss(out, wrong, Y, metric="l2", coef=1.0)
