"""From runs with several lambdas to the trade-off's JSON, Markdown and figure. No JAX."""

import json
import math
import pathlib
import shlex
import sys
from collections.abc import Iterable

import numpy as np
from matplotlib.ticker import NullFormatter

from experiments._common import intervals, provenance
from experiments._common.folder import read_metrics
from experiments._common.grid import ALONE, Cell, scores
from experiments.common import figures, tables

HEADER = ("λ", "accuracy (%)", "minus alone", "95% interval", "p (Holm)")
HEADER += ("cross-entropy (nats)", "distance")


def write(out: str | pathlib.Path, cells: list[Cell], title: str, name: str) -> str:
    """Write <name>.json, .md and .png into a folder; returns the table as text."""
    out = pathlib.Path(out)
    alone = [c for c in cells if c.label == ALONE]
    accuracy, losses = {}, {}
    for one in cells:
        if one.label != ALONE:
            coef = one.settings.distillation.coef
            accuracy.setdefault(coef, []).append(scores(one, "distilled")[-1])
            if one.diverged is None:
                losses.setdefault(coef, []).append(_last_epoch(one.path))
    reference = [scores(c, "student")[-1] for c in alone]
    differences = intervals.compare(accuracy, reference)
    found = {
        "title": title,
        "command": shlex.join(["python", "-m", "experiments.tradeoff", *sys.argv[1:]]),
        **provenance.of(cells),
        "teacher": intervals.summary([scores(c, "teacher")[-1] for c in alone]),
        "alone": intervals.summary(reference),
        "coefs": {
            coef: {
                "accuracy": intervals.summary(values),
                "difference": differences[coef],
                "diverged": {c.seed: c.diverged for c in cells if c.diverged is not None
                             and c.settings.distillation.coef == coef},
                # What lambda was: a number, or its geometric mean over training where tracked.
                "lambda": _geometric([x["coef"] for x in losses.get(coef, [])]),
                **{key: intervals.summary([x[key] for x in losses.get(coef, [])])
                   for key in ("task_loss", "distillation_loss")},
            }
            for coef, values in accuracy.items()
        },
    }  # fmt: skip
    rows = [HEADER, *(_row(coef, values) for coef, values in found["coefs"].items())]
    note = (
        f"{len(alone)} seeds, paired with their student alone "
        f"({_mean(found['alone'])}%; teacher {_mean(found['teacher'])}%). Accuracy of the last "
        "epoch over all test examples; losses are means of the last epoch's training records; "
        "λ of auto is its geometric mean over training; "
        f"95% t-intervals; p is adjusted for {len(rows) - 1} comparisons (Holm). To pick the best "
        "λ from this table is to pick it on the test set."
    )
    (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = [f"# {title}", "", "```bash", found["command"], "```", "", *tables.markdown(rows), ""]
    lines += [
        note,
        "",
        provenance.sentence(found),
        "",
        f"![Accuracy and both losses against lambda]({name}.png)",
        "",
    ]
    (out / f"{name}.md").write_text("\n".join(lines))
    _figure(out / f"{name}.png", found)
    return f"{title}\n{tables.aligned(rows)}\n\n{note}"


def _last_epoch(path: pathlib.Path) -> dict[str, float | None]:
    """Means of both losses over the last epoch's records, and lambda's geometric mean over all."""
    lines = [line for line in read_metrics(path) if line["phase"] == "distilled"]
    last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
    found = {k: float(np.mean([r[k] for r in last])) for k in ("task_loss", "distillation_loss")}
    return {**found, "coef": _geometric([line["coef"] for line in lines])}


def _geometric(values: Iterable[float | None]) -> float | None:
    """The geometric mean; a tracked lambda is 0 or infinite where a gradient vanishes: left out."""
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
    """Four panels over one logarithmic axis of lambda."""
    panels = (
        ("accuracy", "test accuracy (%)"),
        ("difference", "minus student alone (points)"),
        ("task_loss", "cross-entropy, training (nats)"),
        ("distillation_loss", "distance to the teacher, training"),
    )
    figure, grid = figures.plt.subplots(2, 2, figsize=(8, 6), sharex=True)
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
    # Above, for where there is room inside depends on the metric.
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8)
    figures.finish(figure, path)
