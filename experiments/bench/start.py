"""Cold start: seconds from the command to the first step and to the end of experiments.digits.

Run as a module it is one start: the time at which its parent began, then the flags.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

COLUMNS = ("imports", "first step", "end", "compiling")
KINDS = ("no cache", "empty cache", "filled cache")
COMMAND = ("--metric=jw2",)
COMPILE = "/jax/core/compile/backend_compile_duration"


def start(
    out: str, repeats: int = 1, flags: Sequence[str] = COMMAND
) -> tuple[list[dict], list[str]]:
    """Return rows and notes: without a compilation cache, then twice with one that begins empty."""
    from . import measure  # not in the processes whose imports are timed

    del out  # no plot
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for i in range(repeats):
            cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/{i}/cache"}
            # A cache is also what the experiments may set by themselves.
            without = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
            for kind, more in zip(KINDS, (without, cache, cache), strict=True):
                found = _one(more, [*flags, f"--out={folder}/{i}/{kind}/run"])
                runs.append({"start": kind, **found})
    rows = [
        {"start": kind} | {column: _median(runs, kind, column) for column in COLUMNS}
        for kind in KINDS
    ]
    share = _median(runs, "filled cache", "compiling") / _median(runs, "empty cache", "compiling")
    return rows, [
        "Seconds since the command; compiling as JAX counts it, cache look-ups included.",
        measure.verdict("compiling, the second start over the first", share, 1 / 3),
    ]


def _median(runs: list[dict], kind: str, column: str) -> float:
    return statistics.median(run[column] for run in runs if run["start"] == kind)


def _one(environment: dict[str, str], flags: list[str]) -> dict:
    command = [sys.executable, "-m", __name__, str(time.time()), *flags]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"experiments.digits failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run(began: float, flags: list[str]) -> dict:
    seconds = {"imports": 0.0, "first step": 0.0, "compiling": 0.0}

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE:
            seconds["compiling"] += duration_secs

    def first_step(self, step, epoch, metrics):
        if not seconds["first step"]:
            jax.block_until_ready(metrics)
            seconds["first step"] = time.time() - began
        add(self, step, epoch, metrics)

    import jax

    from kd2m_jax.internal import Records

    from .. import digits
    from ..common import cli
    from ..runs import train  # noqa: F401  (what the main loads later)

    seconds["imports"] = time.time() - began
    jax.monitoring.register_event_duration_secs_listener(note)
    add, Records.add = Records.add, first_step
    sys.argv = ["experiments.digits", *flags]
    cli.main(digits.DEFAULTS, digits.run, module="experiments.digits", description=None)
    return {**seconds, "end": time.time() - began}


if __name__ == "__main__":
    print(json.dumps(_run(float(sys.argv[1]), sys.argv[2:])))
