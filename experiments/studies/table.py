"""A table's numbers, from its cells, and the four files that it writes. No JAX."""

import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from ..common import figures, files, tables
from ..common.errors import command
from ..runs.folder import ALONE
from . import intervals, provenance, text
from .grid import Cell, scores
from .latex import latex

# Test accuracy in percent, ResNet-34 to ResNet-18: Fernandes Montesuma, KD2M, GSI 2025, arXiv
# 2504.01757. One seed, ImageNet-pretrained networks, and a student alone that never anneals.
PUBLISHED = {
    "svhn": (94.41, 93.10, 94.00, 94.06, 94.00, 93.94, 93.95, 94.05),
    "cifar10": (86.98, 85.11, 86.45, 86.54, 86.60, 86.63, 86.25, 86.44),
    "cifar100": (62.21, 56.66, 61.07, 61.47, 61.07, 60.68, 61.43, 60.66),
}
_ROWS = ("teacher", ALONE, "w2", "cw2", "jw2", "gaussian-w2", "gaussian-cw2", "gaussian-kl")
CONFIG = ("teacher", "student", "stem", "pretrained_teacher", "pretrained_student", "protocol")
CONFIG += ("optimizer", "epochs", "batch_size", "per_class", "precision", "max_steps")


def write(out: str | pathlib.Path, cells: list[Cell], sizes: dict[str, dict[str, int]]) -> str:
    """Write the four files into a folder; returns the table as text."""
    out = pathlib.Path(out)
    datasets = {}
    for name in sizes:
        datasets[name] = _dataset([c for c in cells if c.dataset == name], name, sizes[name])
    table = {
        "command": " ".join([command("experiments.table"), shlex.join(sys.argv[1:])]),
        **provenance.of(cells),
        "seeds": len({c.seed for c in cells}),
        "datasets": datasets,
        "average": _average(list(datasets.values())) if len(datasets) > 1 else None,
    }
    files.write_json(out / "table.json", table)
    files.write(out / "table.md", "\n".join(text.markdown(table)) + "\n")
    files.write(out / "table.tex", "\n".join(latex(table)) + "\n")
    _figure(out / "table.png", text.sections(table))
    return "\n\n".join(
        f"{text.title(name, found)}\n{tables.aligned(text.rows(found))}\n{text.sentence(found)}"
        for name, found in text.sections(table).items()
    )


def _dataset(cells: list[Cell], name: str, examples: dict[str, int]) -> dict:
    """Collect all numbers of one data set."""
    config = cells[0].folder.config
    asked = {c.row: c.settings.distillation for c in cells}
    published: dict[str, float] = {}
    if name in PUBLISHED:
        published = dict(zip(_ROWS, PUBLISHED[name], strict=True))
    epochs: dict[str, list[list[Any]]] = {
        "teacher": [scores(c, "teacher") for c in cells if c.row == ALONE]
    }
    for cell in cells:
        phase = "student" if cell.row == ALONE else "distilled"
        epochs.setdefault(cell.row, []).append(scores(cell, phase))
    compared = _compare(
        {row: [e[-1] for e in found] for row, found in epochs.items()},
        {row: [None if None in e else max(e) for e in found] for row, found in epochs.items()},
        # Whatever the lambda, because the paper's lambda is in its protocol, not in the row's name.
        {"teacher": published.get("teacher")}
        | {row: published.get(d.metric) for row, d in asked.items()},
    )
    for row, numbers in compared["rows"].items():
        own = [c for c in cells if c.row == (ALONE if row == "teacher" else row)]
        numbers["coef"] = None if row in text.TITLES else asked[row].coef
        steps = {c.seed: c.folder.diverged for c in own}
        numbers["diverged"] = {seed: step for seed, step in steps.items() if step is not None}
        numbers["dates"] = [c.folder.trained_on.isoformat() for c in own]
    # The student alone has no such weight, and published weights bring their own.
    weights = {d.task_coef for d in asked.values() if d.metric != ALONE and d.coef != "published"}
    task_coef = weights.pop() if weights else None
    return {
        "examples": examples,
        "config": {"task_coef": task_coef} | {key: getattr(config, key) for key in CONFIG},
        **compared,
    }


def _compare(last: dict, best: dict, published: dict) -> dict:
    """Compare all rows with the student alone, and all pairs of metrics."""
    metrics = {row: values for row, values in last.items() if row not in text.TITLES}
    differences = intervals.compare(metrics, last[ALONE])
    differences["teacher"] = intervals.paired(last["teacher"], last[ALONE])
    rows = {
        row: {
            "last": {**intervals.summary(last[row]), "values": list(last[row])},
            "best": {**intervals.summary(best[row]), "values": list(best[row])},
            "difference": differences.get(row),
            "published": published.get(row),
        }
        for row in last
    }
    return {"rows": rows, "pairs": intervals.pairs(metrics)}


def _average(datasets: Sequence[dict]) -> dict:
    """Compare each seed's mean over the data sets."""
    names = datasets[0]["rows"]
    last, best = (
        {n: _means([d["rows"][n][e]["values"] for d in datasets]) for n in names}
        for e in ("last", "best")
    )
    published = {}
    if all(d["rows"][ALONE]["published"] for d in datasets):
        found = {n: [d["rows"][n]["published"] for d in datasets] for n in names}
        published = {n: float(np.mean(v)) for n, v in found.items() if None not in v}
    return _compare(last, best, published)


def _means(values: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Average each seed over the data sets; None where it diverged on one."""
    return [None if None in seed else float(np.mean(seed)) for seed in zip(*values, strict=True)]


def _figure(path: pathlib.Path, datasets: dict[str, dict]) -> None:
    """Draw a row of two panels per data set: accuracies, and differences to the student alone."""
    longest = max(len(found["rows"]) for found in datasets.values())
    figure, axes = figures.subplots(
        len(datasets),
        2,
        figsize=(8, len(datasets) * (1 + 0.28 * longest)),
        squeeze=False,
        sharey="row",
    )
    for (left, right), (name, found) in zip(axes, datasets.items(), strict=True):
        rows = list(found["rows"].items())
        titles = {"teacher": "teacher", "none": "student alone"}
        for y, (metric, row) in enumerate(rows):
            colour = {"teacher": figures.PHASES["teacher"], "none": figures.PHASES["student"]}.get(
                metric, figures.PHASES["distilled"]
            )
            values = [value for value in row["last"]["values"] if value is not None]
            left.plot(values, [y] * len(values), "|", color=figures.GREY, markersize=7)
            figures.dot(left, row["last"], y, colour)
            if row["difference"]:
                figures.dot(right, row["difference"], y, colour)
        right.axvline(0, color=figures.PHASES["student"], linewidth=1)
        left.set_yticks(range(len(rows)), [titles.get(metric, metric) for metric, _ in rows])
        left.invert_yaxis()
        left.set_xlabel(f"{name}: test accuracy (%)")
        right.set_xlabel("minus student alone (points)")
    entries = [
        Line2D([], [], color=figures.GREY, marker="|", linestyle="none", label="a single seed"),
        Line2D([], [], color=figures.PHASES["distilled"], marker="o", label="mean, 95% interval"),
    ]
    axes[0][0].legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
                      frameon=False, fontsize=8)  # fmt: skip
    figures.finish(figure, path)
