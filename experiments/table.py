"""The paper's table over seeds, with confidence intervals.

    python -m experiments.table --dataset digits --metrics w2 cw2 jw2 kd=0.9

Rows are the teacher, the student alone and each metric. Every seed has its own teacher and
student alone, which all metrics share: differences are paired. Writes table.md, table.tex,
table.png and table.json beside the cells, which are run folders. What is finished there is
reused, so the same command continues an interrupted table.
"""

import dataclasses
from typing import Annotated, ClassVar

import tyro

from .common.cli import Flags, main, optional
from .studies.grid import Grid


@dataclasses.dataclass(frozen=True)
class Table(Flags):
    """What the table has in it."""

    after_stop: ClassVar[str] = "the same command continues"

    dataset: tuple[str, ...] = ("digits",)
    """Columns, of digits mnist svhn cifar10 cifar100."""
    metrics: tuple[str, ...] = ("w2", "cw2", "jw2", "gaussian-w2", "gaussian-cw2", "gaussian-kl")
    """Rows; with options and a lambda: jw2:beta=0.5=1e-3, kd+cw2=0.9,1e-3."""
    coef: Annotated[str | None, optional("STR", "the main's")] = None
    """Lambda of the others, or auto:RATIO."""
    grid: tyro.conf.OmitArgPrefixes[Grid] = dataclasses.field(default_factory=Grid)


def run(settings: Table) -> None:
    """Train what is missing, then write and print the table."""
    from .studies import grid, schedule, table, text

    cells = grid.cells(settings.grid, settings.dataset, settings.metrics, settings.coef)
    sizes = schedule.train(settings.grid, cells)
    print(f"\n{table.write(settings.grid.out, cells, sizes)}\n\n{text.CAVEAT}")
    print(f"\nTable: {settings.grid.out}/table.md")


if __name__ == "__main__":
    main(Table(), run, module="experiments.table", description=__doc__)
