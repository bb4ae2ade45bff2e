"""A table in LaTeX. No JAX."""

import re

from ..runs.folder import ALONE
from . import text


def latex(table: dict) -> list[str]:
    """Write a table in booktabs, as lines: accuracies and differences to the student alone."""
    datasets = text.sections(table)
    heads = [rf"\multicolumn{{2}}{{c}}{{{_escaped(name)}}}" for name in datasets]
    rules = [rf"\cmidrule(lr){{{2 * i + 2}-{2 * i + 3}}}" for i in range(len(datasets))]
    lines = [
        f"% {table['command']}",
        f"% {table['date']}, {table['seeds']} seeds",
        *(f"% {text.title(name, found)}" for name, found in datasets.items()),
        rf"\begin{{tabular}}{{l{'rr' * len(datasets)}}}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        " ".join(rules),
        " & ".join(["", *[r"accuracy (\%)", r"minus alone [95\%]"] * len(datasets)]) + r" \\",
        r"\midrule",
    ]
    for name in next(iter(datasets.values()))["rows"]:
        cells = [_escaped(text.row_name(name))]
        for found in datasets.values():
            row = found["rows"][name]
            d = row["difference"]
            cells += [_maths(text.mean_text(row["last"]))]
            cells += [
                _maths(f"{text.difference_text(d['mean'])} {text.interval_text(d['interval'])}")
                if d
                else ""
            ]
        lines.append(" & ".join(cells) + r" \\")
        if name == ALONE:
            lines.append(r"\midrule")
    published = [found["rows"] for found in datasets.values()]
    if any(rows[ALONE]["published"] for rows in published):
        heading = r"\emph{published, one seed, other protocol}"
        width = 1 + 2 * len(datasets)
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{{heading}}} \\"]
        for name in next(iter(datasets.values()))["rows"]:
            values = [rows[name]["published"] for rows in published]
            if any(values):
                cells = [f"${v:.2f}$ & " if v else " & " for v in values]
                lines.append(f"{_escaped(text.row_name(name))} & " + " & ".join(cells) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _escaped(name: str) -> str:
    """Escape the characters of a name that LaTeX would read as commands."""
    return re.sub(r"[&%$#_{}]", lambda match: "\\" + match[0], name)


def _maths(numbers: str) -> str:
    """Put numbers into math mode, where a hyphen becomes a minus sign."""
    return re.sub(r"[-+]?\d[\d.]*", r"$\g<0>$", numbers).replace("±", r"$\pm$")
