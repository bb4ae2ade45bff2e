"""Measure side by side: clouds to measure on, times in turn, JSON and a plot."""

import dataclasses
import datetime
import json
import operator
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ..common import machine
from ..common.figures import LINES, subplots

KINDS = ("related", "clustered", "confused", "unrelated")
PAUSE = 0.01  # seconds
PACKAGES = ("jax", "jaxlib", "ott-jax", "pot", "torch", "numpy")


def clouds(kind: str, n: int, d: int, classes: int = 10, seed: int = 0):
    """Draw student and teacher features ``[n, d]`` float32, and labels ``[n]``.

    "related" is a half-trained student: the teacher's features plus noise. "clustered" has the same
    classes around centres that moved. "confused" is "clustered" with one student sample in twenty
    in the wrong cluster, so that no cluster has its teacher's mass. "unrelated" has nothing in
    common but its spread.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    centres = rng.normal(size=(classes, d))
    noise, other = rng.normal(size=(2, n, d))
    if kind == "related":
        teacher = centres[labels] + 0.5 * noise
        student = teacher + 0.5 * other
    elif kind in ("clustered", "confused"):
        moved, taken_for = centres + 0.1 * rng.normal(size=(classes, d)), labels.copy()
        if kind == "confused":
            wrong = rng.choice(np.flatnonzero(labels), max(1, n // 20), replace=False)
            taken_for[wrong] = 0
        student, teacher = moved[taken_for] + 0.15 * noise, centres[labels] + 0.15 * other
    elif kind == "unrelated":
        student, teacher = noise, other + 0.3
    else:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return student.astype(np.float32), teacher.astype(np.float32), labels


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
      columns: its name and other facts in the table, beside its time.
      run: does it once and waits for the result.
    """

    columns: dict
    run: Callable[[], object]


def in_turn(
    cases: Sequence[Case],
    repeats: int,
    seconds: float = 6.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict]:
    """Return the cases' columns with median and quartiles of their times, in milliseconds.

    The cases run in turn, so that a slow moment of the machine hits them all. A first round does
    not count. ``seconds`` ends the measurement early, after three rounds at least. With
    ``time.process_time`` as the clock these are CPU times.
    """
    times: list[list[float]] = [[] for _ in cases]
    for case in cases:
        case.run()
    end = time.perf_counter() + seconds
    while len(times[0]) < repeats and (len(times[0]) < 3 or time.perf_counter() < end):
        for case, spent in zip(cases, times, strict=True):
            # The thread pools of JAX and of torch spin for a while and slow each other down.
            time.sleep(PAUSE)
            start = clock()
            case.run()
            spent.append(1e3 * (clock() - start))
    rows = []
    for case, spent in zip(cases, times, strict=True):
        q1, median, q3 = (float(q) for q in np.percentile(spent, [25, 50, 75]))
        rows.append({**case.columns, "ms": median, "q1": q1, "q3": q3})
    return rows


def compiled(function: Callable, *arrays) -> Callable[[], object]:
    """Compile a scalar function and its gradient to the first array as one program, to time it."""
    both = jax.jit(jax.value_and_grad(function)).lower(*arrays).compile()
    return lambda: jax.block_until_ready(both(*arrays))


def ratios(rows: list[dict], reference: Callable = operator.itemgetter(0)) -> list[dict]:
    """Divide each row's median by one of them: the first, or what ``reference`` picks."""
    base = reference([row["ms"] for row in rows])
    return [{**row, "ratio": row["ms"] / base} for row in rows]


def verdict(what: str, value: float, target: float, *, least: bool = False) -> str:
    """Write a note: what was measured, its target, and whether that is met."""
    met = value >= target if least else value <= target
    bound = "at least" if least else "at most"
    return f"{what}: {value:.2f}, target {bound} {target:.3g}: {'met' if met else 'MISSED'}"


def has_torch() -> bool:
    """Tell whether torch can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def environment() -> dict:
    """Describe the machine, the versions and the day of a measurement."""
    host = machine.host()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": host["machine"],
        "processor": host["cpu"],
        "devices": [device.device_kind for device in jax.devices()],
        "system": platform.system(),
        "cores": host["cores"],
        "python": host["python"],
        "versions": machine.versions(PACKAGES),
        "float32 products": _precision(),
    }


def _precision() -> dict:
    """Tell whether float32 may mean TF32, as JAX's default has it on GPUs since Ampere."""
    config: Any = jax.config
    precision: dict = {"jax": config.jax_default_matmul_precision or "default"}
    if torch := sys.modules.get("torch"):
        precision["torch matmul"] = torch.get_float32_matmul_precision()
        precision["torch cudnn.allow_tf32"] = torch.backends.cudnn.allow_tf32
    return precision


def write(out: str | pathlib.Path, suite: str, rows: Sequence[dict], notes: Sequence[str]) -> None:
    """Write a suite's rows with the machine they were measured on, as JSON."""
    path = pathlib.Path(out) / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"suite": suite, **environment(), "notes": list(notes), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=2) + "\n")


def log_log(
    panels: dict[str, dict[str, list]], path: pathlib.Path, x: str, y: str, *, share: bool = False
) -> None:
    """Plot cost against size: ``{panel: {line: [(x, y, right), ...]}}``, axes logarithmic.

    Points of wrong answers are hollow. ``share`` gives the panels one vertical scale.
    """
    figure, axes = subplots(
        1,
        len(panels),
        figsize=(4 * len(panels), 3.8),
        squeeze=False,
        sharey=share,
        layout="constrained",
    )
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            colour, marker = LINES[names.index(name) % len(LINES)]
            xs, ys, right = zip(*sorted(points), strict=True)
            axis.loglog(xs, ys, color=colour, marker=marker, markersize=5, label=name)
            wrong = [(x, y) for x, y, fine in zip(xs, ys, right, strict=True) if not fine]
            if wrong:
                hollow = {"color": colour, "markerfacecolor": "white", "linestyle": "none"}
                axis.plot(*zip(*wrong, strict=True), marker=marker, markersize=6, **hollow)
        sizes = sorted({point[0] for points in lines.values() for point in points})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(y)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
