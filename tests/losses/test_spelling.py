"""Metrics by their spelled options: what is read, written back, refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from walk import batch

from kd2m_jax import Outputs, losses

Z, H, Y = np.ones((6, 4), np.float32), np.ones((6, 3), np.float32), np.arange(6) % 3


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ("jw2:beta=0.5", {"beta": 0.5}),
        ("w2:solver=ipot:epsilon=2e-2", {"solver": "ipot", "epsilon": 0.02}),
        ("nst:stages=0,-1:kernel=linear", {"stages": (0, -1), "kernel": "linear"}),
        ("cw2:debiased=true", {"debiased": True}),
        ("w2:debiased=False", {"debiased": False}),
        ("CW2:debiased=false", {"debiased": False}),
        ("gaussian_kl:direction=teacher_student", {"direction": "teacher_student"}),
    ],
)
def test_options_written_in_a_name(written, options):
    name = written.partition(":")[0]
    assert losses.get_metric(written) == losses.get_metric(name, **options)
    both = losses.get_metric(f"kd:temperature=2+{written}")
    assert both.metrics == (losses.get_metric("kd", temperature=2), losses.get_metric(written))
    assert losses.get_metric(both.label) == both
    assert losses.get_metric(losses.get_metric(written).written) == losses.get_metric(written)


@pytest.mark.parametrize(
    ("written", "error", "message"),
    [
        ("jw2:beta", ValueError, "written name=value, got 'beta'"),
        ("jw2:bta=1", TypeError, "no option 'bta': did you mean beta"),
        ("w2:epsilon=small", ValueError, "epsilon must be > 0, got small"),
        ("sw2:projections=few", ValueError, "projections must be an integer >= 1, got few"),
        ("sw2:projections=inf", ValueError, "projections must be an integer >= 1, got inf"),
        ("sw2:projections=true", ValueError, "projections must be an integer >= 1, got True"),
        ("kd:temperature=inf", ValueError, "temperature must be a finite number, got inf"),
        ("kd:temperature=true", ValueError, "temperature must be a finite number, got True"),
        ("kd:temperature=1,2", ValueError, r"temperature must be a finite number, got \(1, 2\)"),
        ("kd:temperature=None", ValueError, "temperature must be a finite number, got None"),
        ("w2:debiased=no", ValueError, "debiased must be true or false, got no"),
        ("cw2:debiased=1", ValueError, "debiased must be true or false, got 1"),
        ("jw2:debiased=0", ValueError, "debiased must be true or false, got 0"),
        ("nst:stages=1.5", ValueError, "stages must be a whole number or several, got 1.5"),
        ("nst:stages=last", ValueError, "stages must be a whole number or several, got last"),
        ("mmd-rbf:kernel=linear", ValueError, "has kernel='rbf' by its name, so kernel cannot"),
        ("lohit:solver=exact", ValueError, "has solver='ipot' by its name"),
    ],
)
def test_mistakes_in_written_options(written, error, message):
    with pytest.raises(error, match=message):
        losses.get_metric(written)


def test_terms_of_one_name_are_told_apart_by_their_options():
    both = losses.get_metric("nst:stages=0+nst:stages=0,1+nst:stages=0+mmd-rbf")
    student, teacher, labels = batch()
    names = ["nst:stages=0", "nst:stages=0,1", "nst:stages=0-3", "mmd-rbf"]
    assert list(both.parts(student, teacher, labels)) == names


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "-" * 5000 + "1", "1e200", "1e-200"])
@pytest.mark.parametrize(
    "option",
    ["w2:epsilon", "kd:temperature", "mmd-rbf:bandwidth", "sw2:projections", "nst:stages"],
)
def test_numbers_that_no_float_holds(option, number):
    with pytest.raises(ValueError) as caught:
        losses.get_metric(f"{option}={number}")
    assert len(str(caught.value).split("\n---")[0]) < 200
    if "9" in number and len(number) == 400:  # the same from Python
        name, _, key = option.partition(":")
        with pytest.raises(ValueError, match=key):
            losses.get_metric(name, **{key: int(number)})


@pytest.mark.parametrize("number", [1e16, 1.5e16, 1e22, 1e-7, 1e30, 2.0**70, 10**17, 123456789012])
def test_a_large_number_is_read_back_as_itself(number):
    metric = losses.get_metric("jw2", beta=number)
    assert "+" not in metric.written
    assert losses.get_metric(metric.written) == metric
    both = losses.get_metric(f"{metric.written}+kd")
    assert both.metrics == (metric, losses.get_metric("kd"))
    # Written as Python and older files have it, a plus sign and all, it is no sum either.
    assert losses.get_metric(f"jw2:beta={float(number)!r}") == metric


def test_options_given_twice():
    for twice in (
        lambda: losses.get_metric("kd:temperature=2:temperature=3"),
        lambda: losses.get_metric("kd:temperature=2", temperature=2),
        lambda: losses.get_metric("l2+kd:temperature=2:temperature=2"),
    ):
        with pytest.raises(ValueError, match="'kd' is given temperature twice"):
            twice()


def test_options_by_value():
    """Lists, tuples, NumPy's numbers and arrays are the options that they spell."""
    maps = np.random.default_rng(0).normal(size=(6, 2, 2, 3)).astype(np.float32)
    pair = ((maps, maps), (maps + 1, 2 * maps))
    expected = losses.nst(*pair, stages=(0, 1))
    for stages in ([0, 1], np.array([0, 1]), jnp.array([0, 1]), (np.int64(0), 1)):
        assert losses.nst(*pair, stages=stages) == expected
        assert losses.get_metric("nst", stages=stages) == losses.get_metric("nst:stages=0,1")
    one = losses.get_metric("nst", stages=[0])
    assert losses.get_metric(one.written) == one
    expected = losses.mmd(Z, Z + 1, bandwidth=2.0)
    for two in (np.array(2.0), np.float32(2), jnp.array(2.0), 2):
        assert losses.mmd(Z, Z + 1, bandwidth=two) == expected
        assert losses.get_metric("mmd-rbf", bandwidth=two) == losses.get_metric(
            "mmd-rbf:bandwidth=2"
        )
    for several in ([1.0, 2.0], np.array([1.0, 2.0])):
        message = r"bandwidth must be a finite number, got \(1\.0, 2\.0\)"
        wrong = functools.partial(losses.mmd, bandwidth=several)
        for loss in (wrong, jax.jit(wrong)):
            with pytest.raises(ValueError, match=message):
                loss(Z, Z + 1)
    cost = 1 - np.eye(3, dtype=np.float32)
    first, again = (losses.get_metric("wkd-l", class_cost=c) for c in (cost, cost.copy()))
    assert first == again and hash(first) == hash(again)
    assert first == losses.get_metric("wkd-l", class_cost=jnp.asarray(cost))
    assert first != losses.get_metric("wkd-l", class_cost=cost / 2)
    listed = losses.get_metric("wkd-l", class_cost=cost.tolist())
    out = Outputs(Z, H)
    assert listed(out, out, Y) == first(out, out, Y)
