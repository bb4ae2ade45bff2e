"""The page on when it helps: a text with places for numbers, filled from the JSON files. No JAX.

A place is in double braces: ``{{table mnist transfer}}``, ``{{note mnist transfer}}``, or with a
row ``{{gain mnist transfer cw2}}``; likewise ``mean``, ``points`` and ``over``, and ``fixed`` with
a lambda behind the row.
"""

import functools
import pathlib
import re
from typing import Any

from ...common import figures, files, tables
from ...common.errors import UsageError
from .. import intervals
from . import summary

PANELS = {
    "few": "few labels, few images",
    "transfer": "few labels, many images",
    "noise": "40% of labels wrong",
    "full": "all labels",
}


class Numbers:
    """What the files of a folder hold, read once each."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    @functools.cache  # noqa: B019  (as long-lived as the page)
    def content(self, dataset: str, regime: str) -> dict[str, Any]:
        """Return a file's content; UsageError where there is none."""
        path = self.folder / dataset / f"{regime}.json"
        if not path.exists():
            raise UsageError(f"{path} is missing: python -m experiments.regimes makes it")
        return files.read_object(path)

    @functools.cache  # noqa: B019
    def summary(self, dataset: str, regime: str) -> dict[str, Any]:
        """Return a regime's numbers."""
        return summary.summarised(self.content(dataset, regime))

    def row(self, dataset: str, regime: str, row: str) -> dict[str, Any]:
        """Return a row's numbers; UsageError where there is none of that name."""
        rows = self.summary(dataset, regime)["rows"]
        if row not in rows:
            raise UsageError(f"{dataset}, {regime} has no row {row!r}: {', '.join(rows)}")
        return rows[row]


def filled(text: str, numbers: Numbers) -> str:
    """Put numbers into their places."""

    def place(match: re.Match) -> str:
        kind, dataset, regime, *rest = match[1].split(" ", 3)
        return _PLACES[kind](numbers, dataset, regime, *rest)

    return re.sub(r"\{\{(.+?)\}\}", place, text)


def _table(numbers: Numbers, dataset: str, regime: str) -> str:
    lines = summary.rows_of_text(numbers.content(dataset, regime))
    lines = [
        [lines[0][0] or " ", *lines[0][1:]],
        *([f"`{line[0]}`" if _is_name(line[0]) else line[0], *line[1:]] for line in lines[1:]),
    ]
    return "\n".join(tables.markdown(lines))


def _is_name(row: str) -> bool:
    return " " not in row


def _note(numbers: Numbers, dataset: str, regime: str) -> str:
    return summary.note(numbers.content(dataset, regime))


def _mean(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    return f"{numbers.row(dataset, regime, row)['accuracy']['mean']:.1f}%"


def _teacher(numbers: Numbers, dataset: str, regime: str) -> str:
    return f"{numbers.content(dataset, regime)['about']['teacher_accuracy']:.1f}%"


def _gain(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    d = numbers.row(dataset, regime, row)["difference"]
    p = intervals.p_text(d["p_holm"])
    p = f"p {p}" if p[0] == "<" else f"p = {p}"
    return f"{summary.signed(d['mean'])} {summary.interval_text(d['interval'])}, {p}"


def _points(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    return summary.signed(numbers.row(dataset, regime, row)["difference"]["mean"])


def _fixed(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    row, _, name = row.rpartition(" ")
    return summary.signed(numbers.row(dataset, regime, row)["others"][name]["mean"])


def _over(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    ((name, d),) = numbers.row(dataset, regime, row)["against"].items()
    return f"{summary.signed(d['mean'])} {summary.interval_text(d['interval'])} over `{name}`"


_PLACES = {
    "table": _table,
    "note": _note,
    "teacher": _teacher,
    "mean": _mean,
    "gain": _gain,
    "points": _points,
    "fixed": _fixed,
    "over": _over,
}


def draw(numbers: Numbers, dataset: str, path: pathlib.Path) -> None:
    """Draw every row's difference to the labels alone, a panel for each regime with labels."""
    there = [name for name in PANELS if (numbers.folder / dataset / f"{name}.json").exists()]
    found = {regime: numbers.summary(dataset, regime)["rows"] for regime in there}
    names = [name for name, row in next(iter(found.values())).items() if row["difference"]]
    figure, axes = figures.plt.subplots(
        1, len(found), figsize=(3 + 2.6 * len(found), 0.6 + 0.24 * len(names)),
        sharey=True, squeeze=False,
    )  # fmt: skip
    axes = axes[0]
    for axis, (regime, rows) in zip(axes, found.items(), strict=True):
        axis.axvline(0, color=figures.GREY, linewidth=1)
        for y, name in enumerate(names):
            difference = rows[name]["difference"]
            verdict = intervals.verdict(difference, "p_holm")
            colour = {1: figures.GREEN, -1: figures.RED, 0: figures.GREY}[verdict]
            figures.dot(axis, difference, -y, colour)
        axis.set_title(PANELS[regime], fontsize=10)
        axis.set_xlabel("points over labels alone", fontsize=9)
    axes[0].set_yticks([-y for y in range(len(names))], names, fontsize=8)
    figures.finish(figure, path)


def draw_curves(numbers: Numbers, dataset: str, path: pathlib.Path) -> None:
    """Draw test accuracy against lambda with what auto reaches, a panel per regime."""
    names = [name for name in PANELS if (numbers.folder / dataset / f"curve-{name}.json").exists()]
    figure, axes = figures.plt.subplots(
        1, len(names), figsize=(5 * len(names), 3.4), squeeze=False, sharey=True
    )
    for axis, regime in zip(axes[0], names, strict=True):
        rows = numbers.content(dataset, f"curve-{regime}")["rows"]
        for (name, seeds), (colour, marker) in zip(rows.items(), figures.LINES, strict=False):
            found = _by_lambda(seeds)
            if "none" in found:
                axis.axhline(found["none"]["mean"], color=figures.GREY, linewidth=1, label=name)
                continue
            fixed = {float(k): v for k, v in found.items() if k[0] != "a"}
            axis.plot(fixed, [v["mean"] for v in fixed.values()], color=colour, marker=marker,
                      markersize=4, linewidth=1.2, label=name)  # fmt: skip
            for coef, style in (("auto:0.1", ":"), ("auto:1", "--")):
                axis.axhline(found[coef]["mean"], color=colour, linestyle=style, linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("λ (dotted: auto:0.1, dashed: auto:1)")
        axis.set_title(PANELS[regime], fontsize=10)
    axes[0][0].set_ylabel("test accuracy (%)")
    axes[0][0].legend(fontsize=8)
    figures.finish(figure, path)


def _by_lambda(seeds: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each lambda's summary over seeds."""
    names = next(iter(seeds.values()))["tried"]
    return {
        name: intervals.summary([(one["tried"][name] or [None, None])[1] for one in seeds.values()])
        for name in names
    }


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
    """Write the page from the text and the numbers in a folder, and its figure."""
    numbers = Numbers(folder)
    text = (folder / "page.txt").read_text(encoding="utf-8")
    files.write(page, filled(text, numbers))
    draw(numbers, "mnist", folder / "mnist.png")
    if list(folder.glob("mnist/curve-*.json")):
        draw_curves(numbers, "mnist", folder / "mnist-lambda.png")
