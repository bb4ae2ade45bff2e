"""A finished run's student on test images, beside its teacher.

    python -m experiments.evaluate --run=runs/images-cw2-0

Top-1 and top-5 accuracy, per class and as a confusion matrix, calibration error, agreement with
the teacher, parameters, operations and latency; written into the run folder as evaluation.json
and confusion.png.
"""

import dataclasses
from typing import Annotated

import tyro

from .common.cli import Flags, main, optional


@dataclasses.dataclass(frozen=True)
class Evaluate(Flags):
    """Which run, and on which images."""

    run: str
    """The folder of a finished run."""
    test: Annotated[str | None, optional("DIR", "the run's own")] = None
    """Other pictures, a folder per class."""
    data_dir: Annotated[str | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Folder of tensorflow-datasets."""


def run(settings: Evaluate) -> None:
    """Restore both networks and measure them."""
    from .analysis import evaluation
    from .analysis.examples import examples
    from .analysis.trained import run_folder, trained

    folder = run_folder(settings.run)
    dataset, tested = examples(folder, settings.test, settings.data_dir)
    student, teacher = (trained(folder, dataset, which) for which in (None, "teacher"))
    print(evaluation.write(student, teacher, tested))
    print(f"\nFigure: {folder.path}/confusion.png")


if __name__ == "__main__":
    main(Evaluate(run=tyro.MISSING), run, module="experiments.evaluate", description=__doc__)
