"""What each metric owes under scaling, translation and permutation, and hard inputs."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from walk import VARIANTS, batch, label, speed

from kd2m_jax import losses
from kd2m_jax.losses._solvers import DEFAULT_SOLVER

SHAPES = {"n > d": (24, 8), "n < d": (24, 40)}
# A metric is compiled once a variant and shape, which is where the time goes; options act after
# the shape does, so n < d is for the plain ones, of those that take features.
shaped = pytest.mark.parametrize(
    ("name", "options", "shape"),
    [pytest.param(*v, "n > d", id=label(*v), marks=speed(*v)) for v in VARIANTS]
    + [
        pytest.param(name, {}, "n < d", id=label(name, {}, "n < d"), marks=speed(name))
        for name, info in losses.METRICS.items()
        if "z_s" in inspect.signature(info.function).parameters
    ],
)


class Law(NamedTuple):
    """What a metric's formula promises, beyond a finite value that the order does not change.

    Attributes:
      zero: it is 0 when student and teacher agree.
      symmetric: student and teacher may change places.
      moves: it does not see a translation of both clouds.
      power: with features (or maps) times c its value is times c^power; None for no such law.
    """

    zero: bool = True
    symmetric: bool = False
    moves: bool = True
    power: int | None = None


# Sinkhorn's plan is blurred, and iterations end within 0.1% of their optimum from one side or
# the other: for what transports with them, "exact" and "debiased" stand in these laws.
SQUARED = Law(symmetric=True, power=2)
LAWS = {
    "w2": SQUARED,
    "cw2": SQUARED,
    "jw2": Law(),
    "lohit": Law(zero=False, power=2),
    "gw2": Law(power=2),
    "sw2": SQUARED,
    "scf": Law(symmetric=True, power=0),
    "gaussian-w2": SQUARED,
    "gaussian-cw2": SQUARED,
    "gaussian-kl": Law(power=0),
    "gaussian-ckl": Law(power=0),
    "l2": SQUARED,
    "procrustes": SQUARED,
    "gram": Law(symmetric=True, power=4),
    "cka": Law(symmetric=True, power=0),
    "kd": Law(),
    "nst": Law(symmetric=True, power=0),  # channels have length 1
    "wkd-l": Law(zero=False),  # a fixed number of Sinkhorn iterations, and a cross-entropy
    "wkd-f": Law(symmetric=True),  # sqrt(var + 1e-5)
} | {
    prefix + kernel: found
    for prefix in ("mmd-", "cmmd-")
    for kernel, found in {
        "linear": SQUARED,
        "polynomial": Law(symmetric=True, moves=False),
        "rbf": Law(symmetric=True, power=0),  # a bandwidth relative to the clouds
        "energy": Law(symmetric=True, power=1),
    }.items()
}


def law(metric):
    known = LAWS.get(metric.name, Law(zero=False, moves=False))  # the last test reports that
    options = dict(metric.options)
    debiased = options.get("debiased", False)
    solver = options.get("solver", DEFAULT_SOLVER)  # "auto" is exact here, on the CPU
    if "solver" in parameters_of(metric) and (debiased or solver == "sinkhorn"):
        known = known._replace(zero=debiased, symmetric=False)
    if "label_cost" in parameters_of(metric) and "label_cost" not in options:
        known = known._replace(zero=False)  # a cross-entropy keeps the teacher's entropy
    return known


def parameters_of(metric):
    return losses.METRICS[metric.name].function.__wrapped__.__kwdefaults__ or {}


@functools.cache
def compiled(metric):
    """Value and gradients with respect to everything of both networks: one compilation a shape."""

    def value(networks, labels):
        return metric(*networks, labels, key=jax.random.key(0))

    return jax.jit(jax.value_and_grad(value))


def run(metric, student, teacher, labels):
    value, grads = compiled(metric)((student, teacher), labels)
    return np.asarray(value, np.float64), jax.tree.map(np.asarray, grads)


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def is_finite(tree):
    return all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def scaled(outputs, c):
    """Features and maps times c; logits stay."""
    return outputs._replace(features=c * outputs.features, maps=tuple(c * m for m in outputs.maps))


def collapsed(outputs):
    """Every sample the first one; nothing of it is a round number."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), outputs)


def turned(outputs):
    """Put each sample in the place of the next."""
    return jax.tree.map(lambda a: jnp.roll(a, 1, 0), outputs)


def first_class_scaled(outputs, labels, c=1e-3):
    def scale(a):
        first = (labels == labels[0]).reshape(-1, *[1] * (a.ndim - 1))
        return jnp.where(first, c * a, a)

    return jax.tree.map(scale, outputs)


def dead(outputs, alive=3):
    """Features (or channels) that are constant: 0 from ``alive`` on, and the last one at 0.7."""
    return jax.tree.map(lambda a: a.at[..., alive:].set(0).at[..., -1].set(0.7), outputs)


def saturated(labels, k=24):
    return 2e4 * jax.nn.one_hot(labels, k) - 1e4


def hard_cases(n=24, d=8):
    """Student, teacher and labels by the name of what is hard about them, all of one shape."""
    student, teacher, labels = batch(n, d)
    alone = jnp.where(jnp.arange(n) == 3, 9, labels)
    few_dead, many_dead = dead(student), dead(teacher, alive=1)
    wrong = saturated((labels + 1) % 24)
    return {
        "different clouds": (student, teacher, labels),
        "identical": (student, student, labels),
        "all points equal": (collapsed(student), collapsed(student), labels),
        "all points equal, at 0": (*[jax.tree.map(jnp.zeros_like, student)] * 2, labels),
        "two points": (collapsed(student), collapsed(teacher), labels),
        "collapsed student": (collapsed(student), teacher, labels),
        "collapsed teacher": (student, collapsed(teacher), labels),
        "a class with one sample": (student, teacher, alone),
        "classes of one sample each": (student, teacher, jnp.arange(n)),
        "one class": (student, teacher, jnp.zeros_like(labels)),
        "dead features": (few_dead, dead(teacher), labels),
        "dead in the student": (few_dead, teacher, labels),
        "nearly all dead": (many_dead, many_dead, labels),
        "times 1e-4": (scaled(student, 1e-4), scaled(teacher, 1e-4), labels),
        "times 1e4": (scaled(student, 1e4), scaled(teacher, 1e4), labels),
        "student times 1e4": (scaled(student, 1e4), teacher, labels),
        "far away": (*[o._replace(features=o.features + 1e3) for o in (student, teacher)], labels),
        "one outlier": (
            student._replace(features=student.features.at[0].multiply(1e3)),
            teacher,
            labels,
        ),
        "one class 1e-3 of the others": (
            first_class_scaled(student, labels),
            first_class_scaled(teacher, labels),
            labels,
        ),
        "logits of 1e4, agreeing": (
            student._replace(logits=saturated(labels)),
            teacher._replace(logits=saturated(labels)),
            labels,
        ),
        "logits of 1e4, disagreeing": (
            student._replace(logits=wrong),
            teacher._replace(logits=saturated(labels)),
            labels,
        ),
    }


def check_finite(name, options, cases):
    metric = losses.get_metric(name, **options)
    found = {case: run(metric, *arrays) for case, arrays in cases.items()}
    with np.errstate(over="ignore"):  # a huge lambda must find room in float32 as well
        found = jax.tree.map(lambda a: np.float32(1e6) * a.astype(np.float32), found)
    assert [case for case, result in found.items() if not is_finite(result)] == []
