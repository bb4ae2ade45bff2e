"""Accuracy and both losses against lambda, over seeds.

    python -m experiments.tradeoff --metric=cw2 --coefs 1e-4 1e-3 1e-2 auto:0.1

How strongly should the student be pulled? Runs each lambda over the same seeds as the table, and
from the same cells: what is finished under --out is reused. auto:RATIO tracks the gradients
(see kd2m_jax.make_train_step).
"""

import dataclasses
from typing import ClassVar

import tyro

from .common.cli import Flags, main
from .common.errors import UsageError
from .runs.folder import ALONE
from .studies.grid import Grid


@dataclasses.dataclass(frozen=True)
class Tradeoff(Flags):
    """Which lambdas of which metric."""

    after_stop: ClassVar[str] = "the same command continues"

    dataset: str = "digits"
    """digits, mnist, svhn, cifar10 or cifar100."""
    metric: str = "cw2"
    """As in the mains, with options: jw2:beta=0.5."""
    coefs: tuple[str, ...] = ("1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "auto:0.1")
    """Lambdas > 0, in nats per unit of the metric, or auto:RATIO."""
    grid: tyro.conf.OmitArgPrefixes[Grid] = dataclasses.field(default_factory=Grid)


def run(settings: Tradeoff) -> None:
    """Train what is missing, then write and print the trade-off."""
    from .studies import grid, schedule, tradeoff

    if settings.metric.lower() == ALONE or "+" in settings.metric:
        raise UsageError(f"--metric must be one metric, for one axis of λ: not {settings.metric}")
    if not settings.coefs:
        raise UsageError("--coefs needs a λ")
    metrics = tuple(f"{settings.metric}={coef}" for coef in settings.coefs)
    cells = grid.cells(settings.grid, (settings.dataset,), metrics)
    if any(c.settings.distillation.coef == "0" and c.label != ALONE for c in cells):
        raise UsageError("--coefs must be > 0, for a logarithmic axis: the student alone is 0")
    schedule.train(settings.grid, cells, together=True)
    name = f"tradeoff-{settings.dataset}-{settings.metric}".replace(":", "-")
    title = f"{settings.dataset}: {settings.metric} against λ"
    print(f"\n{tradeoff.write(settings.grid.out, cells, title, name)}")
    print(f"\nFigure: {settings.grid.out}/{name}.png")


if __name__ == "__main__":
    main(Tradeoff(), run, module="experiments.tradeoff", description=__doc__)
