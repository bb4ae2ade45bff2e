"""What the losses cost on this machine, beside the alternatives.

    python -m experiments.bench --suite=peers

Each suite prints a table (times in milliseconds: median and quartiles, runs in turn) and writes
SUITE.json, with machine, versions and date, and where costs grow with size a log-log plot into
--out. On two CPU cores: peers 3 minutes, classes and gaussian half a minute each, growth 3
minutes, step 4, start 2.
"""

import dataclasses
from typing import Annotated, Literal

from experiments._common.cli import UsageError, _optional, main


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to measure."""

    suite: Literal["peers", "classes", "gaussian", "growth", "step", "start"] = "peers"
    """peers: w2, cw2 against torch + POT and ott-jax; classes: 10 against 1,000;
    gaussian: against eigendecompositions; growth: with n and d;
    step: what a metric adds to one; start: until the first step."""
    repeats: Annotated[int | None, _optional("INT", "the suite's own")] = None
    """Measurements of each time, fewer where they take long."""
    out: str = "runs/bench"
    """Folder for JSON and plots."""


def run(settings: Bench) -> None:
    """Measure, print and write."""
    from experiments._common import (
        bench,
        bench_growth,
        bench_losses,
        bench_peers,
        bench_start,
        bench_step,
    )

    suites = {
        "peers": bench_peers.peers,
        "classes": bench_losses.classes,
        "gaussian": bench_losses.gaussian,
        "growth": bench_growth.growth,
        "step": bench_step.step,
        "start": bench_start.start,
    }
    if settings.repeats is not None and settings.repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {settings.repeats}")
    repeats = {} if settings.repeats is None else {"repeats": settings.repeats}
    rows, notes = suites[settings.suite](settings.out, **repeats)
    print("\n".join([bench.text_table(rows), *notes]))
    bench.write(settings.out, settings.suite, rows, notes)


if __name__ == "__main__":
    main(Bench(), run, module="experiments.bench", description=__doc__)
