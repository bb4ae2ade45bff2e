"""How a network is trained, by name: the same for teacher, student alone and distilled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Protocol:
    """An optimizer with its schedule, and the numbers that go with it.

    Attributes:
      summary: one line for tables and reports.
      epochs: passes over the training set.
      batch_size: examples a step.
      optimizer: ``(epochs, steps_per_epoch) -> optax optimizer``.
    """

    summary: str
    epochs: int
    batch_size: int
    optimizer: Callable[[int, int], Any]


def _digits(epochs: int, steps_per_epoch: int):
    return optax.sgd(optax.cosine_decay_schedule(0.1, epochs * steps_per_epoch), momentum=0.9)


def _kd2m(epochs: int, steps_per_epoch: int):
    cosine = optax.cosine_decay_schedule(1e-2, epochs, alpha=1e-2)  # by epoch, as the paper's code
    return optax.sgd(lambda step: cosine(jnp.asarray(step) // steps_per_epoch), momentum=0.9)


def _crd(epochs: int, steps_per_epoch: int):
    # 150, 180 and 210 of 240 epochs; in proportion for another number of them.
    drops: dict[int, float] = {}
    for f in (150, 180, 210):
        step = round(f * epochs / 240) * steps_per_epoch
        drops[step] = 0.1 * drops.get(step, 1.0)  # of few epochs two drops fall on one step
    schedule = optax.piecewise_constant_schedule(0.05, drops)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))


PROTOCOLS = {
    "digits": Protocol("SGD 0.1, momentum 0.9, cosine to 0", 20, 128, _digits),
    "kd2m": Protocol("SGD 0.01, momentum 0.9, cosine by epoch to 1e-4", 15, 128, _kd2m),
    "crd": Protocol(
        "SGD 0.05, momentum 0.9, weight decay 5e-4, x0.1 at 150/180/210 of 240", 240, 64, _crd
    ),
}
