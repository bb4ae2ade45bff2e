"""Cold start: seconds from the command to the first step and to the end of experiments.digits.

Run as a module it is one start: the time at which its parent began, then the flags.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

COMMAND = ("--metric=jw2",)
COMPILE = "/jax/core/compile/backend_compile_duration"


def start(out: str, flags: tuple[str, ...] = COMMAND) -> tuple[list[dict], list[str]]:
    """Rows and notes: without a compilation cache, then twice with one that begins empty."""
    del out  # no plot
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        # A cache is also what the experiments may set by themselves.
        kinds = {
            "no cache": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
            "empty cache": cache,
            "filled cache": cache,
        }
        rows = [
            {"start": kind, **_one(more, [*flags, f"--out={folder}/{i}/run"])}
            for i, (kind, more) in enumerate(kinds.items())
        ]
    first, second = rows[1]["compile s"], rows[2]["compile s"]
    return rows, [f"the second start compiles for {second / first:.2f} of the first (target 1/3)"]


def _one(environment: dict[str, str], flags: list[str]) -> dict:
    command = [sys.executable, "-m", __name__, str(time.time()), *flags]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"experiments.digits failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run(began: float, flags: list[str]) -> dict:
    seconds = {"imports s": 0.0, "first step s": 0.0, "compile s": 0.0}

    def note(event: str, duration: float, **_) -> None:
        if event == COMPILE:
            seconds["compile s"] += duration

    def first_step(self, step, epoch, metrics):
        if not seconds["first step s"]:
            jax.block_until_ready(metrics)
            seconds["first step s"] = time.time() - began
        add(self, step, epoch, metrics)

    import jax

    from experiments import digits
    from experiments._common import cli, train  # noqa: F401  (what the main loads later)
    from kd2m_jax import _log

    seconds["imports s"] = time.time() - began
    jax.monitoring.register_event_duration_secs_listener(note)
    add, _log.Log.add = _log.Log.add, first_step
    sys.argv = ["experiments.digits", *flags]
    cli.main(digits.DEFAULTS, digits.run, module="experiments.digits", description=None)
    return {**seconds, "end s": time.time() - began}


if __name__ == "__main__":
    print(json.dumps(_run(float(sys.argv[1]), sys.argv[2:])))
