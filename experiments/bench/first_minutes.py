"""The first minutes: CPU seconds of what a newcomer waits for, each in a process of its own."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile

from ..common.errors import ROOT

# Imports and parts of the first start. Each is run by a fresh interpreter.
SNIPPETS = {
    "import kd2m_jax.fit": "import kd2m_jax; kd2m_jax.fit",
    "import ott-jax": "import ott.solvers.linear.sinkhorn",
    "import orbax": "import orbax.checkpoint",
    "import tensorboardX": "import experiments.runs.folder",
    "build resnet8": "BUILD resnet8",
    "build resnet34": "BUILD resnet34",
    "load MNIST": "LOAD mnist",
    "load CIFAR-10": "LOAD cifar10",
}
BUILD = (
    "from experiments.common.cli import prepare_jax; prepare_jax(); from flax import nnx; "
    "from kd2m_jax import models; models.build({name!r}, num_classes=10, "
    "image_shape=(32, 32, 3), rngs=nnx.Rngs(0))"
)
LOAD = "from experiments.data.load import load; load({name!r}, {folder!r})"
# The command of README, with what it compiled, what it saved and how long the saves took.
DIGITS = """
import atexit, json, sys, time
count = {"programs": 0, "compiling": 0.0, "saves": 0, "saving": 0.0}
from experiments.common.cli import prepare_jax
prepare_jax()
import jax
def note(event, seconds, **more):
    if event == "/jax/core/compile/backend_compile_duration":
        count["programs"] += 1; count["compiling"] += seconds
jax.monitoring.register_event_duration_secs_listener(note)
from kd2m_jax.internal import Checkpoints
save = Checkpoints.save
def timed(*arguments, **options):
    began = time.process_time(); save(*arguments, **options)
    count["saves"] += 1; count["saving"] += time.process_time() - began
Checkpoints.save = timed
import experiments.digits as digits
from experiments.common import cli
sys.argv = ["experiments.digits", *FLAGS]
cli.main(digits.DEFAULTS, digits.run, module="experiments.digits", description=None)
print("COUNT" + json.dumps(count))
"""


def first_minutes(out: str, repeats: int = 1) -> tuple[list[dict], list[str]]:
    """Return rows and notes: CPU seconds, medians of `repeats` rounds of all in turn."""
    del out  # no plot
    runs: dict[str, list[dict]] = {}
    for _ in range(repeats):
        for name, row in _round():
            runs.setdefault(name, []).append(row)
    columns = list(dict.fromkeys(column for rows in runs.values() for column in rows[0]))
    rows = [
        {"what": name}
        | {c: statistics.median(row[c] for row in found) if c in found[0] else "" for c in columns}
        for name, found in runs.items()
    ]
    return rows, [
        "CPU seconds, user and system, of whole processes. digits is `experiments.digits "
        "--metric=jw2`; cold: no compiled program kept from before; warm: the same once more.",
        f"Python {sys.version.split()[0]}. MNIST and CIFAR-10 are read from KD2M_DATA_DIR, the "
        "second time from the cache of arrays.",
    ]


def _round():
    """Yield each row's name and figures."""
    with tempfile.TemporaryDirectory() as folder:
        without = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XDG_CACHE_HOME": f"{folder}/none"}
        data = os.environ.get("KD2M_DATA_DIR")
        for name, snippet in SNIPPETS.items():
            kind, _, what = snippet.partition(" ")
            if kind == "BUILD":
                snippet = BUILD.format(name=what)
            if kind == "LOAD":
                if data is None:
                    continue
                snippet = LOAD.format(name=what, folder=data)
                yield f"{name}, first", _run(snippet, without)[0]
            yield name, _run(snippet, without)[0]
        for kind in ("cold", "warm"):
            flags = ["--metric=jw2", f"--out={folder}/{kind}/run"]
            code = DIGITS.replace("FLAGS", repr(flags))
            row, printed = _run(code, {"XDG_CACHE_HOME": f"{folder}/cache"})
            yield f"digits, {kind}", row | json.loads(printed.partition("COUNT")[2])


def _run(code: str, environment: dict[str, str]) -> tuple[dict, str]:
    """Run code in a fresh interpreter; return its CPU seconds and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace("experiments.", f"{ROOT}.")],
        # Not the programs' folder of this process, which would make a cold start warm.
        env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | environment,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"a process failed:\n{code}\n{done.stderr[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"CPU s": used}, done.stdout
