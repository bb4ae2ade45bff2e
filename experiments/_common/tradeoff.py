"""From runs with several lambdas to the trade-off's JSON, Markdown and figure. No JAX."""

import json
import pathlib
import shlex
import sys

import numpy as np
from matplotlib.ticker import NullFormatter

from experiments._common import figures, intervals, report
from experiments._common.folder import read_metrics
from experiments._common.grid import ALONE, Cell, scores

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
            accuracy.setdefault(coef, []).append(scores(one.path, "distilled")[-1])
            losses.setdefault(coef, []).append(_last_epoch(one.path))
    reference = [scores(c.path, "student")[-1] for c in alone]
    differences = intervals.compare(accuracy, reference)
    found = {
        "title": title,
        "command": shlex.join(["python", "-m", "experiments.tradeoff", *sys.argv[1:]]),
        "teacher": intervals.summary([scores(c.path, "teacher")[-1] for c in alone]),
        "alone": intervals.summary(reference),
        "coefs": {
            coef: {
                "accuracy": intervals.summary(values),
                "difference": differences[coef],
                # What lambda was: a number, or its geometric mean over training where tracked.
                "lambda": float(np.exp(np.mean([x["log_coef"] for x in losses[coef]]))),
                **{key: intervals.summary([x[key] for x in losses[coef]])
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
    lines = [f"# {title}", "", "```bash", found["command"], "```", "", *report.markdown(rows), ""]
    lines += [note, "", f"![Accuracy and both losses against lambda]({name}.png)", ""]
    (out / f"{name}.md").write_text("\n".join(lines))
    _figure(out / f"{name}.png", found)
    return f"{title}\n{report.aligned(rows)}\n\n{note}"


def _last_epoch(path: pathlib.Path) -> dict[str, float]:
    """Means of both losses over the last epoch's records, and lambda's logarithm over all."""
    lines = [line for line in read_metrics(path) if line["phase"] == "distilled"]
    last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
    found = {k: np.mean([line[k] for line in last]) for k in ("task_loss", "distillation_loss")}
    found["log_coef"] = np.mean([np.log(line["coef"]) for line in lines])
    return {key: float(value) for key, value in found.items()}


def _row(coef: str, found: dict) -> tuple[str, ...]:
    d = found["difference"]
    interval = d["interval"]
    return (
        coef if not coef.startswith("auto") else f"{coef} (mean {found['lambda']:.2g})",
        _mean(found["accuracy"]),
        f"{d['mean']:+.2f}",
        f"[{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "unknown",
        "unknown" if d["p_holm"] is None else f"{d['p_holm']:.3f}",
        f"{found['task_loss']['mean']:.4g}",
        f"{found['distillation_loss']['mean']:.4g}",
    )


def _mean(summary: dict) -> str:
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.2f}"
    return f"{summary['mean']:.2f}{spread}"


def _figure(path: pathlib.Path, found: dict) -> None:
    """Three panels over one logarithmic axis of lambda."""
    panels = (
        ("accuracy", "test accuracy (%)"),
        ("task_loss", "cross-entropy, training (nats)"),
        ("distillation_loss", "distance to the teacher, training"),
    )
    figure, axes = figures.plt.subplots(1, 3, figsize=(10, 3.2))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for auto in (False, True):
            points = sorted(
                (row["lambda"], row[key])
                for coef, row in found["coefs"].items()
                if coef.startswith("auto") == auto
            )
            colour = figures.COLOURS["teacher"] if auto else figures.COLOURS["distilled"]
            for i, (x, summary) in enumerate(points):
                if summary["interval"]:
                    axis.plot([x, x], summary["interval"], color=colour, linewidth=1.5)
                title = None if i else ("λ tracked (auto)" if auto else "λ fixed")
                marker = "D" if auto else "o"
                axis.plot(x, summary["mean"], marker, color=colour, markersize=5, label=title)
            if not auto:
                axis.plot([x for x, _ in points], [s["mean"] for _, s in points], color=colour)
        shown = [row["lambda"] for row in found["coefs"].values()]
        axis.set_xscale("log")
        axis.set_xlim(min(shown) / 3, 3 * max(shown))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("λ")
        axis.set_ylabel(label)
    for phase in ("teacher", "alone"):
        colour = figures.COLOURS["student"] if phase == "alone" else figures.GREY
        title = "student alone" if phase == "alone" else "teacher"
        axes[0].axhline(found[phase]["mean"], color=colour, linewidth=1, label=title)
        if phase == "alone" and found[phase]["interval"]:
            axes[0].axhspan(*found[phase]["interval"], color=colour, alpha=0.15, linewidth=0)
    # Where there is room: the distance falls with lambda.
    handles = axes[0].get_legend_handles_labels()
    axes[2].legend(*handles, loc="upper right", frameon=False, fontsize=8)
    figures.finish(figure, path)
