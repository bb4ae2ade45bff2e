"""Say what is on pictures, by a finished run's student.

    python -m experiments.predict --run=runs/images-cw2-0 photo.jpg

One line per picture: its path, how sure the student is, and the class.
"""

import dataclasses
from typing import Annotated

import tyro

from .common.cli import Flags, main, optional


@dataclasses.dataclass(frozen=True)
class Predict(Flags):
    """Which run, and which pictures."""

    pictures: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="FILE ...", help_behavior_hint="(required)"),
    ]
    """PNG, JPEG or WebP files."""
    run: str
    """The folder of a finished run."""
    data_dir: Annotated[str | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Folder of tensorflow-datasets."""


def run(settings: Predict) -> None:
    """Restore the student and classify."""
    from .analysis.predictions import predictions
    from .analysis.trained import known, run_folder, trained

    folder = run_folder(settings.run)
    student = trained(folder, known(folder, settings.data_dir))
    for line in predictions(student, settings.pictures):
        print(line)


if __name__ == "__main__":
    main(
        Predict(pictures=tyro.MISSING, run=tyro.MISSING),
        run,
        module="experiments.predict",
        description=__doc__,
    )
