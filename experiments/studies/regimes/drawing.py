"""The figures of the page on when it helps, of every data set whose numbers are there. No JAX."""

import math
import pathlib
from typing import Any

import numpy as np

from ...common import figures, files
from .. import intervals
from .page import Numbers, curve, filled
from .study import PAIRS_ROWS

LABELLED = {
    "transfer": "few labels, many images",
    "few": "few labels, few images",
    "noise": "40% of labels wrong",
    "full": "all labels",
}
SHIFTED = {
    "shift-rotation": "rotated 30°",
    "shift-noise": "noise, σ = 0.5",
    "shift-translation": "translated",
    "shift-blur": "blurred",
    "shift-rotation-unequal": "rotated,\nunequal classes",
    "shift-noise-unequal": "noise,\nunequal classes",
}
# Points: where a panel ends on the left, unless a dot lies further.
LEFT = -25


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
    """Write the page from the text and the numbers in a folder, and its figures."""
    numbers = Numbers(folder)
    text = (folder / "page.txt").read_text(encoding="utf-8")
    files.write(page, filled(text, numbers))
    for place in sorted(one for one in folder.iterdir() if one.is_dir()):
        figure = folder / f"{place.name}.png"
        _draw_rows(numbers, place.name, LABELLED, "points over labels alone", figure)
        figure = folder / f"{place.name}-shift.png"
        _draw_rows(numbers, place.name, SHIFTED, "points over no adaptation", figure)
        _draw_curves(numbers, place.name, folder / f"{place.name}-lambda.png")
        if (place / "pairs.json").exists():
            _draw_pairs(numbers, place.name, folder / f"{place.name}-pairs.png")


def _there(numbers: Numbers, dataset: str, panels: dict[str, str], prefix: str = "") -> list[str]:
    """Return the regimes whose numbers are there."""
    return [name for name in panels if (numbers.folder / dataset / f"{prefix}{name}.json").exists()]


def _draw_rows(
    numbers: Numbers, dataset: str, panels: dict[str, str], label: str, path: pathlib.Path
) -> None:
    """Draw every row's difference to the first, a panel per regime.

    A stroke is the same at the lambda, or learning rate, that was fixed in advance; a triangle at
    the left edge one that lies beyond it.
    """
    found = {
        regime: numbers.summary(dataset, regime)["rows"]
        for regime in _there(numbers, dataset, panels)
    }
    if not found:
        return
    names = list(dict.fromkeys(
        name for rows in found.values() for name, row in rows.items() if row["difference"]
    ))  # fmt: skip
    # Of more than three panels two rows: a page is too narrow for their letters side by side.
    lines = 1 if len(found) <= 3 else 2
    columns = math.ceil(len(found) / lines)
    figure, axes = figures.subplots(
        lines, columns, figsize=(3 + 2.2 * columns, lines * (0.9 + 0.24 * len(names))),
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (regime, rows) in zip(axes.flat, found.items(), strict=False):
        axis.axvline(0, color=figures.GREY, linewidth=1)
        drawn = {n: row for n, row in rows.items() if row["difference"]}
        means = [row["difference"]["mean"] for row in drawn.values()]
        left = min([LEFT, *(mean - 2 for mean in means if mean is not None)])
        for y, name in enumerate(names):
            if name not in drawn:
                continue
            difference = drawn[name]["difference"]
            figures.dot(axis, difference, -y, _colour(difference))
            for fixed in list(drawn[name]["others"].values())[:1]:
                if fixed and fixed["mean"] is not None:
                    at, mark = (fixed["mean"], "|") if fixed["mean"] > left else (left, 8)
                    axis.plot(at, -y, marker=mark, color=_colour(fixed), markersize=7)
        if axis.get_xlim()[0] < left:
            axis.set_xlim(left=left - 1)
        axis.set_title(panels[regime], fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.tick_params("y", labelsize=8)
    axes[0, 0].set_yticks([-y for y in range(len(names))], names)
    figures.finish(figure, path)


def _colour(difference: dict[str, Any]) -> str:
    """Return green or red for what is significantly better or worse, else grey."""
    verdict = intervals.verdict(difference, "p_holm")
    return {1: figures.GREEN, -1: figures.RED, 0: figures.GREY}[verdict]


def _draw_curves(numbers: Numbers, dataset: str, path: pathlib.Path) -> None:
    """Draw test accuracy against lambda with what auto reaches, a panel per regime."""
    names = _there(numbers, dataset, LABELLED, "curve-")
    if not names:
        return
    figure, axes = figures.subplots(
        1, len(names), figsize=(5 * len(names), 3.4), squeeze=False, sharey=True
    )
    for axis, regime in zip(axes[0], names, strict=True):
        rows = numbers.content(dataset, f"curve-{regime}")["rows"]
        for (name, seeds), (colour, marker) in zip(rows.items(), figures.LINES, strict=False):
            _draw_curve(axis, name, curve(seeds), colour, marker)
        axis.set_xscale("log")
        axis.set_xlabel("λ")
        axis.set_title(LABELLED[regime], fontsize=10)
    axes[0][0].set_ylabel("test accuracy (%)")
    for label, line in (("auto:0.1", ":"), ("auto:1", "--")):
        axes[0][0].plot([], [], color=figures.GREY, linestyle=line, linewidth=0.8, label=label)
    handles = axes[0][0].get_legend_handles_labels()
    axes[0][-1].legend(*handles, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figures.finish(figure, path)


def _draw_curve(axis, name: str, found: dict[str, Any], colour: str, marker: str) -> None:
    if "none" in found:
        axis.axhline(found["none"]["mean"], color=figures.GREY, linewidth=1, label=name)
        return
    fixed = {float(k): v["mean"] for k, v in found.items() if k[0] != "a"}
    style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2}
    axis.plot(list(fixed), list(fixed.values()), **style, label=name)
    for coef, line in (("auto:0.1", ":"), ("auto:1", "--")):
        axis.axhline(found[coef]["mean"], color=colour, linestyle=line, linewidth=0.8)


def _draw_pairs(numbers: Numbers, dataset: str, path: pathlib.Path) -> None:
    """Draw whom optimal transport pairs after training: the student's class, the teacher's."""
    figure, axes = figures.subplots(1, len(PAIRS_ROWS), figsize=(10, 3.6), sharey=True)
    for axis, row in zip(axes, PAIRS_ROWS, strict=True):
        counts = np.asarray(numbers.content(dataset, "pairs")["rows"][row]["0"]["pairs"])
        axis.imshow(counts / counts.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"{row}, seed 0, λ = 1", fontsize=10)
        axis.set_xlabel("true class of its partner")
        axis.set_xticks(range(len(counts)))
        axis.set_yticks(range(len(counts)))
    axes[0].set_ylabel("true class of the student's image")
    figures.finish(figure, path)
