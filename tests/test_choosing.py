"""The README's "Choosing a metric": what each metric sees, measured, is what the table says."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd2m_jax import Outputs, losses

README = (Path(__file__).parents[1] / "README.md").read_text()
N, D, K = 96, 48, 4


def network(z, logits=None):
    """What a network with these features shows: a linear head, and maps cut from them."""
    head = np.random.default_rng(1).normal(size=(D, K)) / D**0.5
    logits = z @ head if logits is None else logits
    z, logits = (jnp.asarray(a, jnp.float32) for a in (z, logits))
    return Outputs(z, logits, (z.reshape(len(z), 4, 4, 3),))


@functools.cache
def teacher():
    """Four classes, each of points on a skewed distribution; and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(N) % K
    centres = 2 * rng.normal(size=(K, D))
    return centres[labels] + rng.exponential(size=(N, D)) - 1, labels


def in_class(change):
    """A change made class by class."""
    z, labels = teacher()
    out = np.empty_like(z)
    for c in range(K):
        out[labels == c] = change(z[labels == c], np.random.default_rng(c))
    return out


def gaussian_like(z, rng):
    """Points with the mean and covariance of z to the last digit, and nothing else of it.

    An orthogonal mixture of the centred samples, whose sum it keeps at 0.
    """
    n = len(z)
    ones = np.ones((n, 1)) / n**0.5
    basis = np.linalg.qr(np.concatenate([ones, rng.normal(size=(n, n - 1))], 1))[0]
    mixing = np.linalg.qr(rng.normal(size=(n - 1, n - 1)))[0]
    return ones @ (ones.T @ z) + basis[:, 1:] @ mixing @ basis[:, 1:].T @ z


def changes():
    """What a student may differ in from the teacher; its name -> the student's outputs."""
    z, _ = teacher()
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0]
    mean = z.mean(0)
    return {
        "pairs": network(in_class(lambda z, rng: rng.permutation(z))),
        "classes": network(np.roll(z, 1, axis=0)),  # each class takes the place of the next
        "predictions": network(z, logits=np.roll(network(z).logits, 1, axis=1)),
        "shift": network(z + 1),
        "spread": network(mean + 0.5 * (z - mean)),
        "shape": network(in_class(gaussian_like)),
        "rotation": network(mean + (z - mean) @ turn),
    }


def sees(name):
    """A metric's response to each change, in percent of its largest, rounded."""
    z, labels = teacher()
    metric = losses.get_metric(name)
    call = jax.jit(lambda student: metric(student, network(z), labels, key=jax.random.key(0)))
    rest = float(call(network(z)))
    values = {change: abs(float(call(student)) - rest) for change, student in changes().items()}
    return {change: round(100 * v / max(values.values())) for change, v in values.items()}


@functools.cache
def table():
    """The README's rows: metric -> change -> percent."""
    section = README.split("\n## Choosing a metric\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip(" `") for cell in cells] for cells in lines]
    return {name: dict(zip(header[1:], map(int, cells), strict=True)) for name, *cells in rows}


@pytest.mark.parametrize("name", losses.METRICS)
def test_what_a_metric_sees_is_what_the_readme_says(name):
    found = sees(name)
    # Whole percents, of numbers that another CPU may round otherwise.
    assert table()[name] == pytest.approx(found, abs=2), found
