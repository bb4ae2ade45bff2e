"""One result on 1, 2, 4 and 8 devices, for every metric, and what the devices exchange for it."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from children import environment
from walk import CORE, batch, single

from kd2m_jax import (
    Network,
    Outputs,
    init_state,
    losses,
    make_train_step,
    pmap_step,
    shard_map_step,
)

N, D, CLASSES = 32, 8, 4
WRAPPERS = ("pmap", "shard_map")


def init(seed, widths=(6, 8)):
    """Parameters of a network with two maps, features and logits."""
    rng = np.random.default_rng(seed)
    shapes = {"stem": (3, widths[0]), "stage": widths, "last": (widths[1], D), "head": (D, CLASSES)}
    return {name: rng.normal(size=shape) / shape[0] ** 0.5 for name, shape in shapes.items()}


def apply(params, state, x, *, train, rng):
    first = jnp.tanh(x @ params["stem"])
    second = jnp.tanh(first.reshape(-1, 2, 2, 2, 2, first.shape[-1]).mean((2, 4)) @ params["stage"])
    features = second.mean((1, 2)) @ params["last"]
    return Outputs(features, features @ params["head"], (first, second)), state


@functools.cache
def setting():
    """Make a batch, student, teacher and its variables; each class has a centre of its own."""
    rng = np.random.default_rng(0)
    *_, labels = batch(N, D, classes=CLASSES)
    x = rng.normal(size=(CLASSES, 4, 4, 3))[labels] + 0.5 * rng.normal(size=(N, 4, 4, 3))
    student, teacher = (Network(lambda key, x, s=s: (single(init(s)), {}), apply) for s in (1, 0))
    return (single(x), labels), student, teacher, teacher.init(None, x)


def update(name, make_step):
    """Return the metric's value and what gradient descent with rate 1 subtracts for it."""
    data, student, teacher, variables = setting()
    optimizer = optax.sgd(1.0)
    step = make_step(student, teacher, optimizer, metric=name, coef=1.0, task_coef=0.0)
    state = init_state(student, optimizer, data[0], key=jax.random.key(3))
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, variables, data)
    moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)
    return float(metrics["distillation_loss"]), moved


one_device = functools.cache(functools.partial(update, make_step=make_train_step))


def on(wrapper, devices):
    devices = jax.devices()[:devices]
    if wrapper == "pmap":
        return functools.partial(pmap_step, devices=devices)
    return functools.partial(
        shard_map_step, mesh=jax.sharding.Mesh(np.array(devices), ("devices",))
    )


def variants(devices):
    """Every metric; only the paper's, on 4 devices, with the fast tests."""
    for name in losses.METRICS:
        for count in devices:
            for wrapper in WRAPPERS:
                marks = () if name in CORE and count == 4 else (pytest.mark.slow,)
                case = f"{name}-{wrapper}-{count}"
                yield pytest.param(name, wrapper, count, id=case, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrapper", "devices"), list(variants((1, 2, 4, 8))))
def test_value_and_gradient_do_not_depend_on_the_number_of_devices(name, wrapper, devices):
    if devices > jax.device_count():
        pytest.skip("in a process of its own: test_eight_devices")
    value, moved = update(name, on(wrapper, devices))
    expected, gradient = one_device(name)
    assert expected > 1e-4  # something to compare: wkd-l, at its temperature of 8, is 6e-4
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for parameter in gradient:
        scale = np.abs(gradient[parameter]).max()
        np.testing.assert_allclose(moved[parameter], gradient[parameter], atol=1e-4 * scale)


@pytest.mark.slow
def test_eight_devices():
    """The test above again, where there are as many: a process sees the number it started with."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-k", "map-8", __file__]
    command += ["-m", "slow or not slow", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True)
    assert f"{2 * len(losses.METRICS)} passed" in done.stdout, done.stdout
    assert "skipped" not in done.stdout


def gathered_bytes(name):
    """Count what each device receives in a step's all-gathers, from the compiled program."""
    data, student, teacher, variables = setting()
    step = on("shard_map", 4)(student, teacher, optax.sgd(0.1), metric=name)
    state = init_state(student, optax.sgd(0.1), data[0], key=jax.random.key(3))
    program = jax.jit(step).lower(state, variables, data).compile().as_text()
    results = re.findall(r"= (.*) all-gather(?:-start)?\(", program)
    shapes = re.findall(r"[fs]32\[([\d,]+)\]", " ".join(results))
    return sum(4 * np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@pytest.mark.parametrize(
    ("name", "compared"),
    # A class's logits, a cell's channels: numbers of a sample that the metric compares.
    [("l2", D), ("kd", CLASSES), ("nst", 2 * 2 * 8)],
)
def test_only_what_a_metric_compares_is_gathered(name, compared):
    """Both networks' compared outputs; and for the cross-entropy student's logits and labels."""
    logits = 0 if name == "kd" else CLASSES  # compared already
    assert gathered_bytes(name) == 4 * N * (2 * compared + logits + 1)
