"""How time and memory grow with samples and features: each point in a process of its own.

Run as a module it measures one point: metric, n, d, repeats.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from experiments.bench import answers, measure

METRICS = ("w2", "sw2", "gaussian-w2", "gaussian-w2 diagonal")


def growth(
    out: str,
    sizes: Sequence[int] = (1024, 2048, 4096, 8192),
    features: Sequence[int] = (128, 512, 2048),
    repeats: int = 5,
) -> tuple[list[dict], list[str]]:
    """Return rows and notes, and draw growth-*.png; d = 512 and n = 1024 stand still."""
    n_fixed, d_fixed = min(sizes), sorted(features)[len(features) // 2]
    points = [(n, d_fixed) for n in sizes] + [(n_fixed, d) for d in features if d != d_fixed]
    rows = [_point(metric, n, d, repeats) for metric in METRICS for n, d in points]
    notes = []
    for metric in METRICS:
        mine = [row for row in rows if row["metric"] == metric]
        by_n = [row for row in mine if row["d"] == d_fixed]
        by_d = [row for row in mine if row["n"] == n_fixed]
        parts = [
            f"{name} ~ {axis}^{_exponent(group, axis, key):.1f}"
            for axis, group in (("n", by_n), ("d", by_d))
            for name, key in (("time", "ms"), ("memory", "peak MiB"))
            if len(group) > 1 and all(row.get(key) for row in group)
        ]
        notes.append(f"{metric}: " + ", ".join(parts))
    arrays = [r["n x n arrays"] for r in rows if r["metric"] == "w2" and r["n"] == max(sizes)]
    if arrays[0] is not None:
        title = f"w2, n = {max(sizes)}: peak in n x n arrays"
        notes.append(measure.verdict(title, arrays[0], 4))
    for axis, fixed in (("n", ("d", d_fixed)), ("d", ("n", n_fixed))):
        group = [row for row in rows if row[fixed[0]] == fixed[1]]
        panels = {
            title: {
                m: [(r[axis], r[key], True) for r in group if r["metric"] == m] for m in METRICS
            }
            for title, key in (("time, ms", "ms"), ("peak memory, MiB", "peak MiB"))
            if all(row.get(key) for row in group)
        }
        label = {"n": f"samples n (d = {d_fixed})", "d": f"features d (n = {n_fixed})"}[axis]
        measure.log_log(
            panels, pathlib.Path(out) / f"growth-{axis}.png", label, "forward + backward"
        )
    return rows, notes


def _exponent(rows: list[dict], axis: str, key: str) -> float:
    """Return the slope between the two largest sizes, where the leading term shows best."""
    first, second = sorted(rows, key=lambda row: row[axis])[-2:]
    return float(np.log(second[key] / first[key]) / np.log(second[axis] / first[axis]))


def _point(metric: str, n: int, d: int, repeats: int) -> dict:
    command = [sys.executable, "-m", __name__, metric, str(n), str(d), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{metric} at n = {n}, d = {d} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(metric: str, n: int, d: int, repeats: int) -> dict:
    """Return one point's row; its peak is one call's memory above the memory at its beginning."""
    import jax
    import jax.numpy as jnp

    from kd2m_jax import losses

    functions = {
        "w2": losses.w2,
        "sw2": lambda s, t: losses.sw2(s, t, key=jax.random.key(0)),
        "gaussian-w2": losses.gaussian_w2,
        "gaussian-w2 diagonal": lambda s, t: losses.gaussian_w2(s, t, covariance="diagonal"),
    }
    x, y, labels = measure.clouds("related", n, d)
    run = measure.compiled(functions[metric], jnp.asarray(x), jnp.asarray(y))
    peak = _peak_of(run)
    [row] = measure.in_turn([measure.Case({"metric": metric, "n": n, "d": d}, run)], repeats, 4.0)
    row["peak MiB"] = None if peak is None else peak / 2**20
    row["n x n arrays"] = None if peak is None else peak / (4 * n * n)
    name, _, diagonal = metric.partition(" ")
    options = {"covariance": diagonal} if diagonal else {}
    return row | answers.answer(name, *answers.features(x, y), labels, **options)


def _peak_of(run) -> int | None:
    """Return by how many bytes the resident set grows at most while it runs; Linux only."""
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the high-water mark starts again from what is resident now
    except OSError:
        return None

    def read(field: str) -> int:
        [line] = [line for line in status.read_text().splitlines() if line.startswith(field)]
        return 1024 * int(line.split()[1])

    before = read("VmRSS")
    run()
    return read("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], *map(int, sys.argv[2:]))))
