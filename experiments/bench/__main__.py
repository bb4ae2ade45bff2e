"""What the losses cost on this machine, beside the alternatives.

    python -m experiments.bench --suite=peers

Each suite prints a table (times in milliseconds: median and quartiles, runs in turn), says which
answers are right and which targets are met, and writes SUITE.json, with machine, versions and
date, and where costs grow with size a log-log plot into --out. On two CPU cores: losses 12
minutes, peers 7, growth half an hour (estimated), step 5, devices 3, start and population 2 each,
classes and gaussian half a minute each.
"""

import dataclasses
from typing import Annotated

from ..common.cli import Flags, main, optional
from ..common.errors import UsageError
from . import suites


@dataclasses.dataclass(frozen=True)
class Bench(Flags):
    """What to measure."""

    suite: suites.Name = "peers"
    """peers: w2, cw2 against torch + POT and ott-jax; losses: w2, cw2, jw2 against torch + POT,
    value and gradient, on hard clouds too; classes: 10 against 1,000; gaussian: against
    eigendecompositions; growth: every loss; step: what a metric adds; start: until the first
    step; devices: the global batch; population: 8 students in one program; torch-cpu: steps
    beside torch's; gpu-*: on a GPU."""
    repeats: Annotated[int | None, optional("INT", "the suite's own")] = None
    """Measurements of each time, fewer where they take long."""
    out: str = "runs/bench"
    """Folder for JSON and plots."""


def run(settings: Bench) -> None:
    """Measure, print and write."""
    import jax

    from ..common import tables
    from . import measure

    name = settings.suite
    if settings.repeats is not None and settings.repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {settings.repeats}")
    if name.startswith("gpu") and jax.default_backend() == "cpu":
        raise UsageError(f"--suite={name} needs an accelerator, and JAX sees none: jax[cuda13]?")
    if "torch" in name and not measure.has_torch():
        raise UsageError(f"--suite={name} needs torch: uv run --group bench python -m ...")
    repeats = {} if settings.repeats is None else {"repeats": settings.repeats}
    rows, notes = suites.suite(name)(settings.out, **repeats)
    print("\n".join([tables.of_records(rows), *notes]))
    measure.write(settings.out, name, rows, notes)


if __name__ == "__main__":
    main(Bench(), run, module="experiments.bench", description=__doc__)
