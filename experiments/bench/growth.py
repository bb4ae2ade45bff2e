"""How a loss's time and memory grow with samples, features and classes.

Each point is measured in a process of its own. Run as a module it measures one: metric, n, d,
classes, repeats.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kd2m_jax import losses

from . import answers, measure

if TYPE_CHECKING:
    from kd2m_jax import Outputs

METRICS = (*losses.METRICS, "gaussian-w2:covariance=diagonal")
PLOTTED = ("w2", "cw2", "sw2", "gaussian-w2", "gaussian-kl", "mmd-rbf", "gw2")
# A metric's series ends where one call takes longer: the next would take minutes.
LONGEST = 3_000.0  # milliseconds
STAGE = (4, 4)  # the size of the maps, whose channels are an eighth of the features


def growth(
    out: str,
    metrics: Sequence[str] = METRICS,
    sizes: Sequence[int] = (512, 1024, 2048, 4096, 8192),
    features: Sequence[int] = (128, 512, 2048),
    classes: Sequence[int] = (10, 100, 1000),
    repeats: int = 5,
) -> tuple[list[dict], list[str]]:
    """Return rows and notes, and draw growth-n.png and growth-d.png.

    One size grows while the others stand still: n = 1,024, d = 512, 10 classes.
    """
    fixed = {"n": sorted(sizes)[1], "d": sorted(features)[1], "classes": min(classes)}
    rows, notes = [], []
    for metric in metrics:
        parts = []
        for axis, values in (("n", sizes), ("d", features), ("classes", classes)):
            series: list[dict] = []
            for value in sorted(values):
                place = fixed | {axis: value}
                known = [row for row in rows if all(row[k] == v for k, v in place.items())
                         and row["metric"] == metric]  # fmt: skip
                series.append(known[0] if known else _point(metric, **place, repeats=repeats))
                rows += [] if known else series[-1:]
                if series[-1]["ms"] > LONGEST:
                    break
            parts += [f"{name} ~ {axis}^{_exponent(series, axis, key):.1f}"
                      for name, key in (("time", "ms"), ("memory", "peak MiB"))
                      if len(series) > 1 and all(row.get(key) for row in series)]  # fmt: skip
        notes.append(f"{metric}: " + ", ".join(parts))
    notes += _peaks(rows)
    for axis in ("n", "d"):
        _plot(rows, axis, fixed, pathlib.Path(out) / f"growth-{axis}.png")
    return rows, notes


def _peaks(rows: list[dict]) -> list[str]:
    """Judge the memory of transport at its largest n, in matrices of that size."""
    notes = []
    for metric in ("w2", "cw2"):
        mine = [row for row in rows if row["metric"] == metric]
        if mine and (last := max(mine, key=lambda row: row["n"]))["n x n arrays"] is not None:
            title = f"{metric}, n = {last['n']}: peak in n x n arrays"
            notes.append(measure.verdict(title, last["n x n arrays"], 4))
    return notes


def _plot(rows: list[dict], axis: str, fixed: dict, path: pathlib.Path) -> None:
    others = [key for key in fixed if key != axis]
    group = [row for row in rows if all(row[key] == fixed[key] for key in others)]
    panels = {
        title: {m: [(r[axis], r[key], True) for r in group if r["metric"] == m]
                for m in dict.fromkeys(row["metric"] for row in group if row["metric"] in PLOTTED)}
        for title, key in (("time, ms", "ms"), ("peak memory, MiB", "peak MiB"))
        if all(row.get(key) for row in group)
    }  # fmt: skip
    what = {"n": f"samples n (d = {fixed['d']})", "d": f"features d (n = {fixed['n']})"}[axis]
    if any(panels.values()):
        measure.log_log(panels, path, what, "forward + backward")


def _exponent(rows: list[dict], axis: str, key: str) -> float:
    """Return the slope between the two largest sizes, where the leading term shows best."""
    first, second = sorted(rows, key=lambda row: row[axis])[-2:]
    return float(np.log(second[key] / first[key]) / np.log(second[axis] / first[axis]))


def _point(metric: str, n: int, d: int, classes: int, repeats: int) -> dict:
    numbers = map(str, (n, d, classes, repeats))
    done = subprocess.run(
        [sys.executable, "-m", __name__, metric, *numbers], capture_output=True, text=True
    )
    if done.returncode:
        place = f"{metric} at n = {n}, d = {d}, {classes} classes"
        raise RuntimeError(f"{place} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def outputs(n: int, d: int, classes: int) -> tuple["Outputs", "Outputs", np.ndarray]:
    """Draw all that any loss takes: student, half trained, and teacher, and labels."""
    from kd2m_jax import Outputs

    x, y, labels = measure.clouds("related", n, d, classes)
    rng = np.random.default_rng(0)
    head = rng.normal(size=(d, classes)) / d**0.5
    maps = rng.normal(size=(2, n, *STAGE, max(1, d // 8)))
    student, teacher = (
        Outputs(z, (z @ head).astype(np.float32), (stage.astype(np.float32),))
        for z, stage in zip((x, y), maps, strict=True)
    )
    return student, teacher, labels


def _measure(name: str, n: int, d: int, classes: int, repeats: int) -> dict:
    """Return one point's row; its peak is one call's memory above the memory at its beginning."""
    import jax
    import jax.numpy as jnp

    student, teacher, labels = jax.tree.map(jnp.asarray, outputs(n, d, classes))
    metric = losses.get_metric(name)
    run = measure.compiled(
        lambda s, t, labels: metric(s, t, labels, key=jax.random.key(0)), student, teacher, labels
    )
    peak = _peak_of(run)
    columns = {"metric": name, "n": n, "d": d, "classes": classes}
    [row] = measure.in_turn([measure.Case(columns, run)], repeats, 4.0)
    row["peak MiB"] = None if peak is None else peak / 2**20
    row["n x n arrays"] = None if peak is None else peak / (4 * n * n)
    plain, _, option = name.partition(":covariance=")
    options = {"covariance": option} if option else {}
    return row | answers.answer(plain, student, teacher, np.asarray(labels), **options)


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
