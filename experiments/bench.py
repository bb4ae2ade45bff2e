"""What the losses cost, forward and backward, measured side by side on this machine.

    python -m experiments.bench

How much 100 classes cost over 10: the conditional losses are one masked problem, so nearly
nothing. Times in milliseconds, float32; the ratio is to the first row of the metric.
"""

import dataclasses
import json
import pathlib

import tyro


@dataclasses.dataclass(frozen=True)
class Bench:
    """The size of the problem."""

    n: int = 256
    """Samples in a batch."""
    d: int = 512
    """Features of a sample."""
    classes: tuple[int, ...] = (10, 100)
    """Numbers of classes to compare."""
    repeats: int = 30
    """Measurements of each; the median counts."""
    out: str | None = None
    """Write the rows to this JSON file as well."""


def run(settings: Bench) -> None:
    """Measure and print."""
    from experiments._common import bench

    rows = bench.class_count(
        ("cw2", "gaussian-cw2", "gaussian-ckl"),
        settings.classes,
        settings.n,
        settings.d,
        settings.repeats,
    )
    print(f"n = {settings.n}, d = {settings.d}, forward and backward, milliseconds")
    print(bench.text_table(rows))
    if settings.out:
        pathlib.Path(settings.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run(tyro.cli(Bench, prog="python -m experiments.bench", description=__doc__))
