"""To walk the catalogue: a batch with all that a metric may need, and every metric's variants."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import draw

from kd2m_jax import Outputs, losses
from kd2m_jax.losses._solvers import DEFAULT_SOLVER

# Options worth a run of their own, for each metric that has them.
OPTIONS = (
    {},
    {"solver": "exact"},
    {"solver": "auto" if DEFAULT_SOLVER == "sinkhorn" else "sinkhorn"},  # what {} is not
    {"covariance": "diagonal"},
    {"direction": "teacher_student"},
    {"standardize": True},
    {"rotation": True},
    {"label_cost": "kl", "solver": "exact"},
    {"label_cost": "sqeuclidean", "debiased": True},  # debiased takes a symmetric label cost
)


def batch(n=24, d=8, *, classes=4, logits=24, seed=0):
    """Student's and teacher's `Outputs`, float32, and labels; clustered, teacher != student.

    There are logits enough for every sample to be a class of its own.
    """
    z_s, z_t, labels = draw("clustered", n, d, classes=classes, seed=seed)
    rng = np.random.default_rng(seed)
    head = rng.normal(size=(d, logits)) / d**0.5
    maps = [rng.normal(size=(n, *stage)) for stage in ((4, 4, 6), (2, 2, 8))]
    moved = [0.7 * stage + 0.5 * rng.normal(size=stage.shape) + 0.2 for stage in maps]
    student = Outputs(z_s, z_s @ head, tuple(maps))
    teacher = Outputs(z_t, z_t @ head + 0.3 * rng.normal(size=(n, logits)), tuple(moved))
    return (*single((student, teacher)), jnp.asarray(labels))


def single(tree):
    """Every array in float32."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def _variants():
    for name, info in losses.METRICS.items():
        parameters = inspect.signature(info.function).parameters
        # A preset shares its function's code, which needs no second look.
        for options in OPTIONS[:1] if info.options else OPTIONS:
            if options.keys() <= parameters.keys():
                yield name, options
        if "debiased" in parameters and "label_cost" not in parameters and not info.options:
            yield name, {"debiased": True}


def label(name, options=(), *rest):
    """Return what pytest shows for a variant."""
    chosen = (key if value is True else value for key, value in dict(options).items())
    return "-".join([name, *chosen, *rest])


# Compiling is what a walk waits for. The fast one is over the paper's metrics as they are by
# default; their options and the rest of the family are walked with the slow tests.
CORE = ("w2", "cw2", "jw2", "gaussian-w2", "gaussian-cw2", "gaussian-kl", "gaussian-ckl", "l2")


def speed(name, options=()):
    """Return the marks of a metric with options."""
    return () if name in CORE and not options else (pytest.mark.slow,)


def walked(variants):
    """Return the variants as pytest's parameters."""
    return [pytest.param(*v, id=label(*v), marks=speed(*v[:2])) for v in variants]


VARIANTS = list(_variants())
variants = pytest.mark.parametrize(("name", "options"), walked(VARIANTS))


def used(metric):
    """Which of "features", "logits", "maps" the metric reads."""
    parameters = inspect.signature(losses.METRICS[metric.name].function).parameters
    on = ("features",) if "z_s" in parameters else ()
    return on + tuple(stem for stem in ("logits", "maps") if stem in metric.needs)
