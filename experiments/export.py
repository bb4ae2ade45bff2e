"""Write a finished run's student into a file that other programs read.

    python -m experiments.export --run=runs/images-cw2-0 --format=safetensors

safetensors: the weights by their paths, with what it takes to build the network and to feed it in
the metadata. jax: a program for any number of uint8 images, normalisation included, that needs
neither Flax nor this project. The last line is the file's path.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

from .common.cli import Flags, main, optional


@dataclasses.dataclass(frozen=True)
class Export(Flags):
    """Which run, and as what."""

    run: str
    """The folder of a finished run."""
    format: Literal["safetensors", "jax"] = "safetensors"
    """Weights, or a program."""
    data_dir: Annotated[str | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Folder of tensorflow-datasets."""


def run(settings: Export) -> None:
    """Restore the student and write it."""
    from .analysis import exporting
    from .analysis.trained import known, run_folder, trained

    folder = run_folder(settings.run)
    print(exporting.write(trained(folder, known(folder, settings.data_dir)), settings.format))


if __name__ == "__main__":
    main(Export(run=tyro.MISSING), run, module="experiments.export", description=__doc__)
