"""The theorem's chain, gap <= W <= L2, over a run's training.

    python -m experiments.bound --run=runs/digits-cw2-0

Trains the run's two students again (its checkpoints are of the end alone) and measures the chain,
with an exact plan, on test images before, during and after: bound.png and bound.json in its
folder. The real classifiers' gap of cross-entropies is drawn below it; the theorem does not cover
that one.
"""

import dataclasses
from typing import Annotated

import tyro

from .common.cli import Flags, main, optional
from .common.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Bound(Flags):
    """Which run, and how finely."""

    run: str
    """The folder of a finished run."""
    points: int = 8
    """Moments of the training to look at, beside its beginning."""
    examples: int = 300
    """Test images, the first ones."""
    data_dir: Annotated[str | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Folder of tensorflow-datasets."""


def run(settings: Bound) -> None:
    """Train again, measure, draw."""
    from .analysis import bound
    from .analysis.finished import finished

    for flag, value in (("--points", settings.points), ("--examples", settings.examples)):
        if value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")
    analysed = finished(settings.run, settings.data_dir)
    print(bound.write(analysed, settings.points, settings.examples))
    print(f"\nFigure: {settings.run}/bound.png")


if __name__ == "__main__":
    main(Bound(run=tyro.MISSING), run, module="experiments.bound", description=__doc__)
