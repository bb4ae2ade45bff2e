"""A trade-off's numbers, from runs with several lambdas, and its three files. No JAX."""

import math
import pathlib
import shlex
import sys
from collections.abc import Iterable

import numpy as np
from matplotlib.ticker import NullFormatter

from ..common import figures, files, tables
from ..common.errors import command
from ..runs.folder import ALONE
from . import intervals, provenance
from .grid import Cell, scores

HEADER = ("λ", "accuracy (%)", "minus alone", "95% interval", "p (Holm)")
HEADER += ("cross-entropy (nats)", "distance")


def write(out: str | pathlib.Path, cells: list[Cell], title: str, name: str) -> str:
    """Write <name>.json, .md and .png into a folder; returns the table as text."""
    out = pathlib.Path(out)
    numbers = {
        "title": title,
        "command": " ".join([command("experiments.tradeoff"), shlex.join(sys.argv[1:])]),
        **provenance.of(cells),
        **_numbers(cells),
    }
    rows = [HEADER, *(_row(coef, row) for coef, row in numbers["coefs"].items())]
    note = (
        f"{sum(c.label == ALONE for c in cells)} seeds, paired with their student alone "
        f"({_mean(numbers['alone'])}%; teacher {_mean(numbers['teacher'])}%). Accuracy of the last "
        "epoch over all test examples; losses are means of the last epoch's training records; "
        "λ of auto is its geometric mean over training; "
        f"95% t-intervals; p is adjusted for {len(rows) - 1} comparisons (Holm). To pick the best "
        "λ from this table is to pick it on the test set."
    )
    files.write_json(out / f"{name}.json", numbers)
    lines = [f"# {title}", "", "```bash", numbers["command"], "```", "", *tables.markdown(rows), ""]
    lines += [
        note,
        "",
        provenance.sentence(numbers),
        "",
        f"![Accuracy and both losses against lambda]({name}.png)",
        "",
    ]
    files.write(out / f"{name}.md", "\n".join(lines))
    _figure(out / f"{name}.png", numbers)
    return f"{title}\n{tables.aligned(rows)}\n\n{note}"


def _numbers(cells: list[Cell]) -> dict:
    """Collect teacher, student alone and each lambda, over seeds."""
    alone = [c for c in cells if c.label == ALONE]
    accuracy, losses, diverged = {}, {}, {}
    for one in cells:
        if one.label != ALONE:
            coef = one.settings.distillation.coef
            accuracy.setdefault(coef, []).append(scores(one, "distilled")[-1])
            if one.folder.diverged is None:
                losses.setdefault(coef, []).append(_last_epoch(one.folder.records))
            else:
                diverged.setdefault(coef, {})[one.seed] = one.folder.diverged
    reference = [scores(c, "student")[-1] for c in alone]
    differences = intervals.compare(accuracy, reference)
    return {
        "teacher": intervals.summary([scores(c, "teacher")[-1] for c in alone]),
        "alone": intervals.summary(reference),
        "coefs": {
            coef: {
                "accuracy": intervals.summary(values),
                "difference": differences[coef],
                "diverged": diverged.get(coef, {}),
                # What lambda was: a number, or its geometric mean over training where tracked.
                "lambda": _geometric([x["coef"] for x in losses.get(coef, [])]),
                **{key: intervals.summary([x[key] for x in losses.get(coef, [])])
                   for key in ("task_loss", "distillation_loss")},
            }
            for coef, values in accuracy.items()
        },
    }  # fmt: skip


def _last_epoch(records: list[dict]) -> dict[str, float | None]:
    """Average both losses over the last epoch's records, and lambda geometrically over all."""
    lines = [line for line in records if line["phase"] == "distilled"]
    last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
    found = {k: float(np.mean([r[k] for r in last])) for k in ("task_loss", "distillation_loss")}
    return {**found, "coef": _geometric([line["coef"] for line in lines])}


def _geometric(values: Iterable[float | None]) -> float | None:
    """Average geometrically, without 0 and infinity, which a vanishing gradient gives."""
    logs = [math.log(value) for value in values if value and math.isfinite(value)]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _row(coef: str, found: dict) -> tuple[str, ...]:
    d = found["difference"]
    interval = d["interval"]
    tracked = coef.startswith("auto") and found["lambda"]
    return (
        f"{coef} (mean {found['lambda']:.2g})" if tracked else coef,
        _mean(found["accuracy"]) + _diverged(found),
        "unknown" if d["mean"] is None else f"{d['mean']:+.2f}",
        f"[{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "unknown",
        intervals.p_text(d["p_holm"]),
        *(
            "unknown" if mean is None else f"{mean:.4g}"
            for mean in (found["task_loss"]["mean"], found["distillation_loss"]["mean"])
        ),
    )


def _diverged(found: dict) -> str:
    runs = [f"seed {seed} diverged at step {step}" for seed, step in found["diverged"].items()]
    return f" ({', '.join(runs)}: left out)" if runs else ""


def _mean(summary: dict) -> str:
    if summary["mean"] is None:
        return "unknown"
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.2f}"
    return f"{summary['mean']:.2f}{spread}"


def _figure(path: pathlib.Path, found: dict) -> None:
    """Draw four panels over one logarithmic axis of lambda."""
    panels = (
        ("accuracy", "test accuracy (%)"),
        ("difference", "minus student alone (points)"),
        ("task_loss", "cross-entropy, training (nats)"),
        ("distillation_loss", "distance to the teacher, training"),
    )
    figure, grid = figures.subplots(2, 2, figsize=(8, 6), sharex=True)
    axes = grid.ravel()
    shown = {coef: row for coef, row in found["coefs"].items() if row["lambda"]}
    for axis, (key, label) in zip(axes, panels, strict=True):
        for auto in (False, True):
            points = [
                (row["lambda"], row[key])
                for coef, row in sorted(shown.items(), key=lambda item: item[1]["lambda"])
                if coef.startswith("auto") == auto and row[key]["mean"] is not None
            ]
            colour = figures.PHASES["teacher"] if auto else figures.PHASES["distilled"]
            for i, (x, summary) in enumerate(points):
                if summary["interval"]:
                    axis.plot([x, x], summary["interval"], color=colour, linewidth=1.5)
                title = None if i else ("λ tracked (auto)" if auto else "λ fixed")
                marker = "D" if auto else "o"
                axis.plot(x, summary["mean"], marker, color=colour, markersize=5, label=title)
            if not auto:
                axis.plot([x for x, _ in points], [s["mean"] for _, s in points], color=colour)
        axis.set_ylabel(label)
    if shown:
        lambdas = [row["lambda"] for row in shown.values()]
        axes[0].set_xscale("log")
        axes[0].set_xlim(min(lambdas) / 3, 3 * max(lambdas))
        axes[0].xaxis.set_minor_formatter(NullFormatter())
    for axis in grid[1]:
        axis.set_xlabel("λ")
    for phase in ("teacher", "alone"):
        colour = figures.PHASES["student"] if phase == "alone" else figures.GREY
        title = "student alone" if phase == "alone" else "teacher"
        if found[phase]["mean"] is None:
            continue
        axes[0].axhline(found[phase]["mean"], color=colour, linewidth=1, label=title)
        if phase == "alone" and found[phase]["interval"]:
            axes[0].axhspan(*found[phase]["interval"], color=colour, alpha=0.15, linewidth=0)
    axes[1].axhline(0, color=figures.PHASES["student"], linewidth=1)
    # Above, because where there is room inside depends on the metric.
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8)
    figures.finish(figure, path)
