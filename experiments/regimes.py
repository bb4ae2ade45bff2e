"""Which distance helps, and when: with few, wrong, no or all labels.

    python -m experiments.regimes --dataset=digits --regimes transfer shift

Writes one JSON file per data set and regime under --out; what is there is not trained again, so
the same command goes on after a stop.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

from .common.cli import Flags, main, optional
from .common.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Regimes(Flags):
    """What is trained."""

    after_stop: ClassVar[str] = "the same command continues"

    dataset: Literal["digits", "mnist", "cifar10", "cifar10-conv"] = "digits"
    """Which images; cifar10-conv has a convolutional student."""
    regimes: tuple[str, ...] = ("few", "transfer", "noise", "full", "label-free", "shift")
    """Some of few, transfer, noise, full, label-free, shift, curve (over λ) and pairs."""
    seeds: int = 5
    """Seeds of the student and of the images that are drawn."""
    out: str = "runs/regimes"
    """Folder of the JSON files, a folder for each data set."""
    data_dir: Annotated[str | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Folder of tensorflow-datasets."""
    smoke: bool = False
    """One seed and few steps, to see that it runs."""


def run(settings: Regimes) -> None:
    """Train what is missing, and say where the numbers are."""
    import pathlib

    from .studies.regimes import run as study
    from .studies.regimes import summary
    from .studies.regimes.study import REGIMES

    if settings.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {settings.seeds}")
    for regime in settings.regimes:
        if regime not in REGIMES:
            raise UsageError(
                f"--regimes takes {', '.join(REGIMES[:-1])} and {REGIMES[-1]}: not {regime}"
            )
    for store in study.run(
        pathlib.Path(settings.out), settings.dataset, settings.regimes, settings.seeds,
        data_dir=settings.data_dir, smoke=settings.smoke,
    ):  # fmt: skip
        print(f"\n{summary.text(store.content)}\n\nNumbers: {store.path}")


if __name__ == "__main__":
    main(Regimes(), run, module="experiments.regimes", description=__doc__)
