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
    "mean": _mean,
    "gain": _gain,
    "points": _points,
    "fixed": _fixed,
    "over": _over,
}


def draw(numbers: Numbers, dataset: str, path: pathlib.Path) -> None:
    """Draw every row's difference to the labels alone, a panel for each regime with labels."""
    found = {regime: numbers.summary(dataset, regime)["rows"] for regime in PANELS}
    names = [name for name, row in next(iter(found.values())).items() if row["difference"]]
    figure, axes = figures.plt.subplots(
        1, len(PANELS), figsize=(11, 0.6 + 0.24 * len(names)), sharey=True
    )
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


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
    """Write the page from the text and the numbers in a folder, and its figure."""
    numbers = Numbers(folder)
    text = (folder / "page.txt").read_text(encoding="utf-8")
    files.write(page, filled(text, numbers))
    draw(numbers, "mnist", folder / "mnist.png")
