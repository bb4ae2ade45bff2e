"""The global batch over 1 to 8 devices: the metric's share of a step, and what is exchanged.

Run as a module it measures on the devices that it sees: the sizes of the global batch.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kd2m_jax import from_nnx, init_state, models, shard_map_step

from . import measure

PAIR, SHAPE = ("mlp-teacher", "mlp-student"), (28, 28, 1)


def devices(
    out: str,
    counts: Sequence[int] = (1, 2, 4, 8),
    sizes: Sequence[int] = (128, 256, 512, 1024, 2048),
    repeats: int = 15,
) -> tuple[list[dict], list[str]]:
    """Return rows and notes, with the CPU's cores in the place of devices.

    So times do not fall with their number. What every device computes for itself, the n x n costs
    and their plan, does show.
    """
    del out  # no plot
    rows = []
    for count in counts:
        flags = f"--xla_force_host_platform_device_count={count}"
        command = [sys.executable, "-m", __name__, str(repeats), *map(str, sizes)]
        done = subprocess.run(
            command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{count} devices failed:\n{done.stderr[-2000:]}")
        rows += json.loads(done.stdout.splitlines()[-1])
    return rows, [_note(count, [r for r in rows if r["devices"] == count]) for count in counts]


def _note(count: int, rows: list[dict]) -> str:
    above = [row["n"] for row in rows if row["share"] > 0.5]
    found = f"from n = {min(above)} on" if above else f"at no n up to {rows[-1]['n']}"
    return f"{count} devices: cw2 is more than half of the step {found}"


def measured(sizes: Sequence[int], repeats: int) -> list[dict]:
    """Return a row per global batch: a step with cw2, and its share beyond a step without."""
    rows = []
    for n in sizes:
        cases, exchanged = [], 0
        for metric in (None, "cw2"):
            run, arguments = _program(n, metric)
            exchanged = gathered_bytes(run.as_text() or "")
            cases.append(measure.Case({}, _once(run, *arguments)))
        none, cw2 = measure.in_turn(cases, repeats)
        name = {"devices": jax.device_count(), "n": n, "gathered bytes": exchanged}
        rows.append(name | cw2 | {"none": none["ms"], "share": 1 - none["ms"] / cw2["ms"]})
    return rows


def gathered_bytes(program: str) -> int:
    """Count the bytes that each device holds after a step's all-gathers, from the program."""
    results = re.findall(r"= (.*) all-gather(?:-start)?\(", program)
    shapes = re.findall(r"[fs]32\[([\d,]+)\]", " ".join(results))
    return sum(4 * _product(map(int, shape.split(","))) for shape in shapes)


def _product(numbers) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _program(n: int, metric: str | None):
    teacher, student = (
        from_nnx(models.build(name, num_classes=10, image_shape=SHAPE, rngs=nnx.Rngs(seed)))
        for seed, name in enumerate(PAIR)
    )
    x, labels = jax.random.normal(jax.random.key(0), (n, *SHAPE)), jnp.arange(n) % 10
    optimizer = optax.sgd(0.01)
    step = shard_map_step(student, teacher, optimizer, metric=metric, coef=1e-3)
    state = init_state(student, optimizer, x, key=jax.random.key(0))
    arguments = (state, teacher.init(None, x), (x, labels))
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile(), arguments


def _once(run, state, variables, batch):
    def once():
        nonlocal state  # the step donates it
        state, scores = run(state, variables, batch)
        jax.block_until_ready((state, scores))

    return once


if __name__ == "__main__":
    print(json.dumps(measured([int(n) for n in sys.argv[2:]], int(sys.argv[1]))))
