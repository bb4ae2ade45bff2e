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
      lr: the learning rate, before its schedule lowers it.
      schedule: ``(lr, epochs, steps_per_epoch) -> a number or an optax schedule``.
      weight_decay: of all parameters.
    """

    summary: str
    epochs: int
    batch_size: int
    lr: float
    schedule: Callable[[float, int, int], Any]
    weight_decay: float = 0.0

    def optimizer(
        self,
        epochs: int,
        steps_per_epoch: int,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        optimizer: str = "sgd",
    ) -> Any:
        """Return the optax optimizer; what is given takes the place of the protocol's own."""
        schedule = self.schedule(self.lr if lr is None else lr, epochs, steps_per_epoch)
        decay = self.weight_decay if weight_decay is None else weight_decay
        if optimizer == "adamw":
            return optax.adamw(schedule, weight_decay=decay)
        rule = optax.sgd(schedule, momentum=0.9) if optimizer == "sgd" else optax.adam(schedule)
        return optax.chain(optax.add_decayed_weights(decay), rule) if decay else rule


def _cosine(lr: float, epochs: int, steps_per_epoch: int):
    return optax.cosine_decay_schedule(lr, epochs * steps_per_epoch)


def _cosine_by_epoch(lr: float, epochs: int, steps_per_epoch: int):
    cosine = optax.cosine_decay_schedule(lr, epochs, alpha=1e-2)  # as the paper's code
    return lambda step: cosine(jnp.asarray(step) // steps_per_epoch)


def _drops(lr: float, epochs: int, steps_per_epoch: int):
    # 150, 180 and 210 of 240 epochs; in proportion for another number of them.
    drops: dict[int, float] = {}
    for f in (150, 180, 210):
        step = round(f * epochs / 240) * steps_per_epoch
        drops[step] = 0.1 * drops.get(step, 1.0)  # of few epochs two drops fall on one step
    return optax.piecewise_constant_schedule(lr, drops)


PROTOCOLS = {
    "digits": Protocol("SGD 0.1, momentum 0.9, cosine to 0", 20, 128, 0.1, _cosine),
    "kd2m": Protocol(
        "SGD 0.01, momentum 0.9, cosine by epoch to 1e-4", 15, 128, 1e-2, _cosine_by_epoch
    ),
    "crd": Protocol(
        "SGD 0.05, momentum 0.9, weight decay 5e-4, x0.1 at 150/180/210 of 240",
        240,
        64,
        0.05,
        _drops,
        weight_decay=5e-4,
    ),
}
