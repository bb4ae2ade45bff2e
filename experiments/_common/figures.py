"""The figures of tables and studies: dots with 95% intervals, in Okabe and Ito's colours."""

import pathlib

from matplotlib.lines import Line2D

from experiments._common import report
from experiments._common.report import COLOURS, plt

GREY = "#999999"


def table(path: pathlib.Path, datasets: dict[str, dict]) -> None:
    """A row of two panels a data set: accuracies, and differences to the student alone."""
    longest = max(len(found["rows"]) for found in datasets.values())
    figure, axes = plt.subplots(
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
            colour = {"teacher": COLOURS["teacher"], "none": COLOURS["student"]}.get(
                metric, COLOURS["distilled"]
            )
            values = [value for value in row["last"]["values"] if value is not None]
            left.plot(values, [y] * len(values), "|", color=GREY, markersize=7)
            dot(left, row["last"], y, colour)
            if row["difference"]:
                dot(right, row["difference"], y, colour)
        right.axvline(0, color=COLOURS["student"], linewidth=1)
        left.set_yticks(range(len(rows)), [titles.get(metric, metric) for metric, _ in rows])
        left.invert_yaxis()
        left.set_xlabel(f"{name}: test accuracy (%)")
        right.set_xlabel("minus student alone (points)")
    entries = [
        Line2D([], [], color=GREY, marker="|", linestyle="none", label="a single seed"),
        Line2D([], [], color=COLOURS["distilled"], marker="o", label="mean, 95% interval"),
    ]
    axes[0][0].legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
                      frameon=False, fontsize=8)  # fmt: skip
    finish(figure, path)


def dot(axis, summary: dict, y: float, colour: str) -> None:
    """A mean with its interval, lying; nothing where all seeds diverged."""
    if summary["mean"] is None:
        return
    if summary["interval"]:
        axis.plot(summary["interval"], [y, y], color=colour, linewidth=1.5)
    axis.plot([summary["mean"]], [y], "o", color=colour, markersize=5)


def finish(figure, path: pathlib.Path) -> None:
    """Drop what is not needed, save and close."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    report.plt.close(figure)
