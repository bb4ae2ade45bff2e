"""What all figures share: one palette for colour-blind readers, axes and saving."""

import pathlib
import warnings
from typing import Any

from matplotlib.figure import Figure  # without pyplot, which looks for a window to draw in

# The colours of Okabe and Ito, distinct for colour-blind readers.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, YELLOW, BLACK = "#56B4E9", "#D55E00", "#F0E442", "#000000"
GREY, BROWN = "#999999", "#7F4F24"

PHASES = {"teacher": BLUE, "student": ORANGE, "distilled": GREEN}
# Up to ten classes.
CLASSES = (ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, BLACK, GREY, BROWN)
# Lines of a plot, each with a marker of its own.
LINES = (
    (BLUE, "o"),
    (RED, "s"),
    (ORANGE, "^"),
    (GREEN, "D"),
    (PINK, "v"),
    (SKY, "P"),
    (BLACK, "x"),
)


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], layout=None, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes, as pyplot does."""
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def dot(axis, summary: dict, y: float, colour: str) -> None:
    """Draw a mean with its horizontal interval; nothing where all seeds diverged."""
    if summary["mean"] is None:
        return
    if summary["interval"]:
        axis.plot(summary["interval"], [y, y], color=colour, linewidth=1.5)
    axis.plot([summary["mean"]], [y], "o", color=colour, markersize=5)


def finish(figure, path: pathlib.Path) -> None:
    """Drop the upper and the right frame, and save the figure."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings():
        # Names of classes may have letters that the font lacks: they are boxes.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.tight_layout()
        figure.savefig(path, dpi=150)


def plain(text: str, length: int) -> str:
    """Return a name of the user's, cut off, that matplotlib does not take for a formula."""
    return text[:length].replace("$", r"\$")
