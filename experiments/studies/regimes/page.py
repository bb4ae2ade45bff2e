"""The page on when it helps: a text with places for numbers, filled from the JSON files. No JAX.

A place is in double braces: ``{{table mnist transfer}}``, ``{{note mnist transfer}}``, or with a
row ``{{gain mnist transfer cw2}}``; likewise ``mean``, ``points`` and ``over``; ``fixed`` and
``fixedgain`` with a lambda behind the row; ``right`` and ``swaps`` of pairs, ``range`` of a curve.
"""

import functools
import pathlib
import re
from typing import Any

from ...common import files, tables
from ...common.errors import UsageError
from .. import intervals
from . import summary


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
    return _with_p(numbers.row(dataset, regime, row)["difference"])


def _with_p(d: dict[str, Any]) -> str:
    p = intervals.p_text(d["p_holm"])
    p = f"p {p}" if p[0] == "<" else f"p = {p}"
    return f"{summary.signed(d['mean'])} {summary.interval_text(d['interval'])}, {p}"


def _points(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    return summary.signed(numbers.row(dataset, regime, row)["difference"]["mean"])


def _fixed(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    row, _, name = row.rpartition(" ")
    return summary.signed(numbers.row(dataset, regime, row)["others"][name]["mean"])


def _fixedgain(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    row, _, name = row.rpartition(" ")
    return _with_p(numbers.row(dataset, regime, row)["others"][name])


def _over(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    return " and ".join(
        f"{summary.signed(d['mean'])} {summary.interval_text(d['interval'])} over `{name}`"
        for name, d in numbers.row(dataset, regime, row)["against"].items()
    )


def _right(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    """Write the share of pairs of one class, before and after training, mean over seeds."""
    found = numbers.content(dataset, regime)["rows"][row].values()
    before, after = (100 * sum(one["right"][i] for one in found) / len(found) for i in (0, 1))
    return f"{before:.0f}% before training, {after:.0f}% after"


def _swaps(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    """Write with which class of the teacher's how many images of a class are paired, of one seed.

    Of the classes whose largest share is paired with another one.
    """
    counts = numbers.content(dataset, regime)["rows"][row]["0"]["pairs"]
    partners = [(i, max(range(len(line)), key=line.__getitem__)) for i, line in enumerate(counts)]
    return ", ".join(
        f"{100 * counts[i][j] / sum(counts[i]):.0f}% of {i} with {j}" for i, j in partners if i != j
    )


def _range(numbers: Numbers, dataset: str, regime: str, row: str) -> str:
    """Write the lambdas of a curve whose mean accuracy is within a point of the best."""
    found = curve(numbers.content(dataset, regime)["rows"][row])
    means = {name: one["mean"] for name, one in found.items() if name[0] != "a" and one["mean"]}
    good = [float(name) for name, mean in means.items() if mean >= max(means.values()) - 1]
    return f"{min(good):g} to {max(good):g}"


def curve(seeds: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each lambda's summary over the seeds of a row."""
    names = next(iter(seeds.values()))["tried"]
    return {
        name: intervals.summary([(one["tried"][name] or [None, None])[1] for one in seeds.values()])
        for name in names
    }


_PLACES = {
    "table": _table,
    "note": _note,
    "teacher": _teacher,
    "mean": _mean,
    "gain": _gain,
    "points": _points,
    "fixed": _fixed,
    "fixedgain": _fixedgain,
    "over": _over,
    "right": _right,
    "swaps": _swaps,
    "range": _range,
}
