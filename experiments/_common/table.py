"""From the cells of a table to table.json, table.md, table.tex and table.png. No JAX."""

import json
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from experiments._common import intervals, provenance
from experiments._common.grid import ALONE, Cell, scores
from experiments.common import figures, tables

# Test accuracy in percent, ResNet-34 to ResNet-18: Fernandes Montesuma, KD2M, GSI 2025, arXiv
# 2504.01757. One seed, ImageNet-pretrained networks, and a student alone that never anneals.
PUBLISHED = {
    "svhn": (94.41, 93.10, 94.00, 94.06, 94.00, 93.94, 93.95, 94.05),
    "cifar10": (86.98, 85.11, 86.45, 86.54, 86.60, 86.63, 86.25, 86.44),
    "cifar100": (62.21, 56.66, 61.07, 61.47, 61.07, 60.68, 61.43, 60.66),
}
_ROWS = ("teacher", ALONE, "w2", "cw2", "jw2", "gaussian-w2", "gaussian-cw2", "gaussian-kl")
TITLES = {"teacher": "teacher", ALONE: "student alone"}
CONFIG = ("teacher", "student", "stem", "pretrained_teacher", "pretrained_student", "protocol")
CONFIG += ("optimizer", "epochs", "batch_size", "per_class", "precision", "max_steps")
_HEADER = ("", "λ", "accuracy (%)", "minus alone", "95% interval", "p (Holm)", "best epoch (%)")
CAVEAT = (
    "Mean ± standard deviation over seeds of the last epoch's accuracy over all test examples; "
    "differences are paired by seed (same teacher, initialisation and batches), with 95% "
    "t-intervals; p is adjusted for the number of metrics (Holm). They measure what another seed "
    "would change, not another test set. The best epoch is chosen on the test set, so it flatters."
)


def write(out: str | pathlib.Path, cells: list[Cell], sizes: dict[str, dict[str, int]]) -> str:
    """Write the four files into a folder; returns the table as text."""
    out = pathlib.Path(out)
    datasets = {}
    for name in sizes:
        datasets[name] = _dataset([c for c in cells if c.dataset == name], name, sizes[name])
    table = {
        "command": shlex.join(["python", "-m", "experiments.table", *sys.argv[1:]]),
        **provenance.of(cells),
        "seeds": len({c.seed for c in cells}),
        "datasets": datasets,
        "average": _average(list(datasets.values())) if len(datasets) > 1 else None,
    }
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    (out / "table.md").write_text("\n".join(_markdown(table)) + "\n")
    (out / "table.tex").write_text("\n".join(_latex(table)) + "\n")
    _figure(out / "table.png", {**datasets, **_averaged(table)})
    return "\n\n".join(
        f"{_title(name, found)}\n{tables.aligned(_rows(found))}\n{_sentence(found)}"
        for name, found in {**datasets, **_averaged(table)}.items()
    )


def _dataset(cells: list[Cell], name: str, examples: dict[str, int]) -> dict:
    """All numbers of one data set."""
    config = json.loads((cells[0].path / "config.json").read_text())
    asked = {c.row: c.settings.distillation for c in cells}
    published: dict[str, float] = {}
    if name in PUBLISHED:
        published = dict(zip(_ROWS, PUBLISHED[name], strict=True))
    epochs: dict[str, list[list[Any]]] = {
        "teacher": [scores(c, "teacher") for c in cells if c.row == ALONE]
    }
    for cell in cells:
        phase = "student" if cell.row == ALONE else "distilled"
        epochs.setdefault(cell.row, []).append(scores(cell, phase))
    compared = _compare(
        {row: [e[-1] for e in found] for row, found in epochs.items()},
        {row: [None if None in e else max(e) for e in found] for row, found in epochs.items()},
        # Whatever its lambda: the paper's own is in its protocol, not in the row's name.
        {"teacher": published.get("teacher")}
        | {row: published.get(d.metric) for row, d in asked.items()},
    )
    for row, numbers in compared["rows"].items():
        own = [c for c in cells if c.row == (ALONE if row == "teacher" else row)]
        numbers["coef"] = None if row in TITLES else asked[row].coef
        numbers["diverged"] = {c.seed: c.diverged for c in own if c.diverged is not None}
        numbers["dates"] = [provenance.date(c) for c in own]
    # Beside a distance, so not of the student alone; published weights bring their own.
    weights = {d.task_coef for d in asked.values() if d.metric != ALONE and d.coef != "published"}
    task_coef = weights.pop() if weights else None
    return {
        "examples": examples,
        "config": {"task_coef": task_coef} | {key: config[key] for key in CONFIG},
        **compared,
    }


def _compare(last: dict, best: dict, published: dict) -> dict:
    """Rows with differences to the student alone, and all pairs of metrics."""
    metrics = {row: values for row, values in last.items() if row not in TITLES}
    differences = intervals.compare(metrics, last[ALONE])
    differences["teacher"] = intervals.paired(last["teacher"], last[ALONE])
    rows = {
        row: {
            "last": {**intervals.summary(last[row]), "values": list(last[row])},
            "best": {**intervals.summary(best[row]), "values": list(best[row])},
            "difference": differences.get(row),
            "published": published.get(row),
        }
        for row in last
    }
    return {"rows": rows, "pairs": intervals.pairs(metrics)}


def _average(datasets: Sequence[dict]) -> dict:
    """The same of each seed's mean over the data sets."""
    names = datasets[0]["rows"]
    last, best = (
        {n: _means([d["rows"][n][e]["values"] for d in datasets]) for n in names}
        for e in ("last", "best")
    )
    published = {}
    if all(d["rows"][ALONE]["published"] for d in datasets):
        found = {n: [d["rows"][n]["published"] for d in datasets] for n in names}
        published = {n: float(np.mean(v)) for n, v in found.items() if None not in v}
    return _compare(last, best, published)


def _means(values: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Of each seed over the data sets; None where it diverged on one."""
    return [None if None in seed else float(np.mean(seed)) for seed in zip(*values, strict=True)]


def _averaged(table: dict) -> dict:
    return {"average": table["average"]} if table["average"] else {}


def _title(name: str, found: dict) -> str:
    if name == "average":
        return "average of the data sets"
    config, examples = found["config"], found["examples"]
    cut = f", cut after {config['max_steps']} steps" if config["max_steps"] else ""
    task = f", weight of the labels {config['task_coef']:g}" if config["task_coef"] else ""
    return (
        f"{name}: {config['teacher']} to {config['student']}{task}; protocol "
        f"{config['protocol']} ({config['optimizer']}), {config['epochs']} epochs, batch "
        f"{config['batch_size']}{cut}; {examples['train']:,} training and "
        f"{examples['test']:,} test examples"
    )


def _rows(found: dict) -> list[list[str]]:
    published = any(row["published"] for row in found["rows"].values())
    table = [[*_HEADER, *["published (%)"] * published]]
    for name, row in found["rows"].items():
        difference = row["difference"] or {}
        cells = [_name(name), row.get("coef") or "", _mean(row["last"])]
        cells += [_difference(difference["mean"]) if difference else ""]
        cells += [_interval(difference.get("interval")) if difference else ""]
        cells += [
            intervals.p_text(difference["p_holm"]) if "p_holm" in difference else "",
            _mean(row["best"]),
        ]
        table.append(cells + [f"{row['published']:.2f}" if row["published"] else ""] * published)
    return table


def _name(row: str) -> str:
    return TITLES.get(row, row)


def _mean(summary: dict) -> str:
    if summary["mean"] is None:
        return "diverged"
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.2f}"
    left = [value for value in summary["values"] if value is not None]
    missing = len(summary["values"]) - len(left)
    return f"{summary['mean']:.2f}{spread}" + (f" ({len(left)} seeds)" if missing else "")


def _difference(mean: float | None) -> str:
    return "unknown" if mean is None else f"{mean:+.2f}"


def _interval(interval: list[float] | None) -> str:
    return f"[{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "unknown"


def _sentence(found: dict) -> str:
    """What can be told apart, in words."""
    metrics = {name: row["difference"] for name, row in found["rows"].items() if name not in TITLES}
    n = len(found["rows"][ALONE]["last"]["values"])
    groups: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for name, difference in metrics.items():
        groups[intervals.verdict(difference)].append(name)
    words = {1: "above", -1: "below", 0: "not told apart from"}
    parts = [f"{words[k]} the student alone: {', '.join(v)}" for k, v in groups.items() if v]
    sure = [name for name, d in metrics.items() if intervals.verdict(d, "p_holm")]
    ordered = [p for p in found["pairs"] if intervals.verdict(p, "p_holm")]
    teacher = found["rows"]["teacher"]["difference"]
    return (
        f"By 95% intervals over {n} seeds: {'; '.join(parts) or 'no metric compared'}. After "
        f"adjustment for {len(metrics)} metrics: {', '.join(sure) or 'none'} told apart. Of "
        f"{len(found['pairs'])} pairs of metrics {len(ordered)} are told apart after adjustment"
        + "".join(f"; {_ordered(pair)}" for pair in ordered)
        + f". The teacher minus the student alone: {_difference(teacher['mean'])} points, "
        f"{_interval(teacher['interval'])}." + _diverged(found)
    )


def _diverged(found: dict) -> str:
    """Which runs diverged, and what that does to the numbers."""
    runs = [
        f"{_name(name)}, seed {seed} at step {step}"
        for name, row in found["rows"].items()
        for seed, step in row.get("diverged", {}).items()
    ]
    if not runs:
        return ""
    return (
        f" Diverged, and left out of their rows' means and of all differences: {'; '.join(runs)}. "
        "What is left of such a row are the seeds that went well."
    )


def _ordered(pair: dict) -> str:
    sign = ">" if pair["mean"] > 0 else "<"
    return f"{pair['first']} {sign} {pair['second']}"


def _markdown(table: dict) -> list[str]:
    lines = ["# Teacher, student alone and each metric", "", "```bash", table["command"], "```", ""]
    lines += [f"{table['seeds']} seeds. {CAVEAT}", ""]
    datasets = {**table["datasets"], **_averaged(table)}
    if table["average"]:
        lines += [*tables.markdown(_columns(table)), ""]
    for name, found in datasets.items():
        lines += [f"## {_title(name, found)}", "", *tables.markdown(_rows(found)), ""]
        lines += [_sentence(found), ""]
    if any(row["published"] for d in datasets.values() for row in d["rows"].values()):
        lines += [
            "Published: KD2M (arXiv 2504.01757), one seed and another protocol (ImageNet-"
            "pretrained networks), so not to be compared with ours number by number.",
            "",
        ]
    lines += ["![Accuracies and differences to the student alone](table.png)", ""]
    return [*lines, provenance.sentence(table)]


def _columns(table: dict) -> list[list[str]]:
    """The paper's form: a column a data set, and the average."""
    datasets = {**table["datasets"], **_averaged(table)}
    names = next(iter(datasets.values()))["rows"]
    return [
        ["", *(f"{name} (%)" for name in datasets)],
        *([_name(n), *(_mean(d["rows"][n]["last"]) for d in datasets.values())]
          for n in names),
    ]  # fmt: skip


def _latex(table: dict) -> list[str]:
    """The same columns, each with its difference to the student alone, in booktabs."""
    datasets = {**table["datasets"], **_averaged(table)}
    heads = [rf"\multicolumn{{2}}{{c}}{{{_escaped(name)}}}" for name in datasets]
    rules = [rf"\cmidrule(lr){{{2 * i + 2}-{2 * i + 3}}}" for i in range(len(datasets))]
    lines = [
        f"% {table['command']}",
        f"% {table['date']}, {table['seeds']} seeds",
        *(f"% {_title(name, found)}" for name, found in datasets.items()),
        rf"\begin{{tabular}}{{l{'rr' * len(datasets)}}}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        " ".join(rules),
        " & ".join(["", *[r"accuracy (\%)", r"minus alone [95\%]"] * len(datasets)]) + r" \\",
        r"\midrule",
    ]
    for name in next(iter(datasets.values()))["rows"]:
        cells = [_escaped(_name(name))]
        for found in datasets.values():
            row = found["rows"][name]
            d = row["difference"]
            cells += [_maths(_mean(row["last"]))]
            cells += [_maths(f"{_difference(d['mean'])} {_interval(d['interval'])}") if d else ""]
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
                lines.append(f"{_escaped(_name(name))} & " + " & ".join(cells) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _escaped(name: str) -> str:
    """A name with what LaTeX would read as its own."""
    return re.sub(r"[&%$#_{}]", lambda found: "\\" + found[0], name)


def _maths(text: str) -> str:
    """Numbers in math mode, where a minus is one."""
    return re.sub(r"[-+]?\d[\d.]*", r"$\g<0>$", text).replace("±", r"$\pm$")


def _figure(path: pathlib.Path, datasets: dict[str, dict]) -> None:
    """Draw a row of two panels per data set: accuracies, and differences to the student alone."""
    longest = max(len(found["rows"]) for found in datasets.values())
    figure, axes = figures.plt.subplots(
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
            colour = {"teacher": figures.PHASES["teacher"], "none": figures.PHASES["student"]}.get(
                metric, figures.PHASES["distilled"]
            )
            values = [value for value in row["last"]["values"] if value is not None]
            left.plot(values, [y] * len(values), "|", color=figures.GREY, markersize=7)
            figures.dot(left, row["last"], y, colour)
            if row["difference"]:
                figures.dot(right, row["difference"], y, colour)
        right.axvline(0, color=figures.PHASES["student"], linewidth=1)
        left.set_yticks(range(len(rows)), [titles.get(metric, metric) for metric, _ in rows])
        left.invert_yaxis()
        left.set_xlabel(f"{name}: test accuracy (%)")
        right.set_xlabel("minus student alone (points)")
    entries = [
        Line2D([], [], color=figures.GREY, marker="|", linestyle="none", label="a single seed"),
        Line2D([], [], color=figures.PHASES["distilled"], marker="o", label="mean, 95% interval"),
    ]
    axes[0][0].legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
                      frameon=False, fontsize=8)  # fmt: skip
    figures.finish(figure, path)
