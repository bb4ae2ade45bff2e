"""A run's features in the plane, without and with distillation.

    python -m experiments.features --run=runs/digits-cw2-0

Takes teacher, student alone (trained on the labels only, which is what "before distillation"
means here) and distilled student from a finished run's checkpoints; writes features.png (PCA of
the teacher's features; t-SNE of all three networks' together) and features.json (silhouette of
the classes, exact squared distances to the teacher) into its folder.
"""

import dataclasses
from typing import Annotated

import tyro

from .common.cli import Flags, main, optional
from .common.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Features(Flags):
    """Which run, and how many of its test images."""

    run: str
    """The folder of a finished run."""
    examples: int = 500
    """Test images, of at most 10 classes."""
    seed: int = 0
    """Random seed of t-SNE."""
    data_dir: Annotated[str | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Folder of tensorflow-datasets."""


def run(settings: Features) -> None:
    """Restore, embed, measure."""
    from .analysis import features
    from .analysis.finished import finished

    if settings.examples < 20:
        raise UsageError(f"--examples must be at least 20, got {settings.examples}")
    analysed = finished(settings.run, settings.data_dir)
    print(features.write(analysed, settings.examples, settings.seed))
    print(f"\nFigure: {settings.run}/features.png")


if __name__ == "__main__":
    main(Features(run=tyro.MISSING), run, module="experiments.features", description=__doc__)
