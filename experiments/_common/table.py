"""From the cells of a table to table.json, table.md, table.tex and table.png. No JAX."""

import datetime
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence

import numpy as np

from experiments._common import figures, intervals, report
from experiments._common.grid import ALONE, Cell, scores

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
    first = json.loads((cells[0].path / "env.json").read_text())
    table = {
        "command": shlex.join(["python", "-m", "experiments.table", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "environment": {k: first[k] for k in ("python", "machine", "packages", "devices")},
        "seeds": len({c.seed for c in cells}),
        "datasets": datasets,
        "average": _average(list(datasets.values())) if len(datasets) > 1 else None,
    }
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    (out / "table.md").write_text("\n".join(_markdown(table)) + "\n")
    (out / "table.tex").write_text("\n".join(_latex(table)) + "\n")
    figures.table(out / "table.png", {**datasets, **_averaged(table)})
    return "\n\n".join(
        f"{_title(name, found)}\n{report.aligned(_rows(found))}\n{_sentence(found)}"
        for name, found in {**datasets, **_averaged(table)}.items()
    )


def _dataset(cells: list[Cell], name: str, examples: dict[str, int]) -> dict:
    """All numbers of one data set."""
    config = json.loads((cells[0].path / "config.json").read_text())
    metrics = [(c.label, c.settings.distillation) for c in cells if c.label != ALONE]
    own = [d.coef for label, d in metrics if label == d.metric]
    epochs = {"teacher": [scores(c.path, "teacher") for c in cells if c.label == ALONE]}
    for cell in cells:
        phase = "student" if cell.label == ALONE else "distilled"
        epochs.setdefault(cell.label, []).append(scores(cell.path, phase))
    return {
        "examples": examples,
        "config": {"coef": own[0] if own else None} | {key: config[key] for key in CONFIG},
        **_compare(
            {row: [e[-1] for e in found] for row, found in epochs.items()},
            {row: [max(e) for e in found] for row, found in epochs.items()},
            dict(zip(_ROWS, PUBLISHED[name], strict=True)) if name in PUBLISHED else {},
        ),
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
        {n: np.mean([d["rows"][n][e]["values"] for d in datasets], axis=0).tolist() for n in names}
        for e in ("last", "best")
    )
    published = {}
    if all(d["rows"][ALONE]["published"] for d in datasets):
        found = {n: [d["rows"][n]["published"] for d in datasets] for n in names}
        published = {n: float(np.mean(v)) for n, v in found.items() if None not in v}
    return _compare(last, best, published)


def _averaged(table: dict) -> dict:
    return {"average": table["average"]} if table["average"] else {}


def _title(name: str, found: dict) -> str:
    if name == "average":
        return "average of the data sets"
    config, examples = found["config"], found["examples"]
    cut = f", cut after {config['max_steps']} steps" if config["max_steps"] else ""
    weight = f", λ = {config['coef']}" if config["coef"] else ""
    return (
        f"{name}: {config['teacher']} to {config['student']}{weight}; protocol "
        f"{config['protocol']} ({config['optimizer']}), {config['epochs']} epochs, batch "
        f"{config['batch_size']}{cut}; {examples['train']:,} training and "
        f"{examples['test']:,} test examples"
    )


def _rows(found: dict) -> list[list[str]]:
    published = any(row["published"] for row in found["rows"].values())
    header = ["", "accuracy (%)", "minus alone", "95% interval", "p (Holm)", "best epoch (%)"]
    table = [header + ["published (%)"] * published]
    for name, row in found["rows"].items():
        difference = row["difference"] or {}
        cells = [_name(name), _mean(row["last"])]
        cells += [f"{difference['mean']:+.2f}" if difference else ""]
        cells += [_interval(difference.get("interval")) if difference else ""]
        cells += [_p(difference["p_holm"]) if "p_holm" in difference else "", _mean(row["best"])]
        table.append(cells + [f"{row['published']:.2f}" if row["published"] else ""] * published)
    return table


def _name(row: str) -> str:
    return TITLES.get(row, row)


def _mean(summary: dict) -> str:
    return f"{summary['mean']:.2f}" + (
        f" ± {summary['sd']:.2f}" if summary["sd"] is not None else ""
    )


def _interval(interval: list[float] | None) -> str:
    return f"[{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "unknown"


def _p(p: float | None) -> str:
    return "unknown" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


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
        + f". The teacher minus the student alone: {teacher['mean']:+.2f} points, "
        f"{_interval(teacher['interval'])}."
    )


def _ordered(pair: dict) -> str:
    sign = ">" if pair["mean"] > 0 else "<"
    return f"{pair['first']} {sign} {pair['second']}"


def _markdown(table: dict) -> list[str]:
    packages = table["environment"]["packages"]
    lines = ["# Teacher, student alone and each metric", "", "```bash", table["command"], "```", ""]
    lines += [f"{table['seeds']} seeds. {CAVEAT}", ""]
    datasets = {**table["datasets"], **_averaged(table)}
    if table["average"]:
        lines += [*report.markdown(_columns(table)), ""]
    for name, found in datasets.items():
        lines += [f"## {_title(name, found)}", "", *report.markdown(_rows(found)), ""]
        lines += [_sentence(found), ""]
    if any(row["published"] for d in datasets.values() for row in d["rows"].values()):
        lines += [
            "Published: KD2M (arXiv 2504.01757), one seed and another protocol (ImageNet-"
            "pretrained networks), so not to be compared with ours number by number.",
            "",
        ]
    lines += ["![Accuracies and differences to the student alone](table.png)", ""]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    lines += [f"{table['date']}, {', '.join(table['environment']['devices'])}, {versions}."]
    return lines


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
    heads = [f"\\multicolumn{{2}}{{c}}{{{name}}}" for name in datasets]
    rules = [f"\\cmidrule(lr){{{2 * i + 2}-{2 * i + 3}}}" for i in range(len(datasets))]
    lines = [
        f"% {table['command']}",
        f"% {table['date']}, {table['seeds']} seeds",
        *(f"% {_title(name, found)}" for name, found in datasets.items()),
        f"\\begin{{tabular}}{{l{'rr' * len(datasets)}}}",
        "\\toprule",
        " & ".join(["", *heads]) + r" \\",
        " ".join(rules),
        " & ".join(["", *[r"accuracy (\%)", r"minus alone [95\%]"] * len(datasets)]) + r" \\",
        "\\midrule",
    ]
    for name in next(iter(datasets.values()))["rows"]:
        cells = [_name(name).replace("_", r"\_")]
        for found in datasets.values():
            row = found["rows"][name]
            cells += ["$" + _mean(row["last"]).replace("±", r"\pm") + "$"]
            d = row["difference"]
            cells += [f"${d['mean']:+.2f}$ {_interval(d['interval'])}" if d else ""]
        lines.append(" & ".join(cells).replace("λ", r"$\lambda$") + r" \\")
        if name == ALONE:
            lines.append("\\midrule")
    published = [found["rows"] for found in datasets.values()]
    if any(rows[ALONE]["published"] for rows in published):
        lines += ["\\midrule", r"\multicolumn{1}{l}{\emph{published, one seed, other protocol}} \\"]
        for name in next(iter(datasets.values()))["rows"]:
            values = [rows[name]["published"] for rows in published]
            if any(values):
                cells = [f"${v:.2f}$ & " if v else " & " for v in values]
                lines.append(f"{_name(name)} & " + " & ".join(cells) + r" \\")
    return [*lines, "\\bottomrule", "\\end{tabular}"]
