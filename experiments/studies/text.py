"""The words of a table: titles, cells, what is statistically significant, Markdown. No JAX."""

from ..common import tables
from ..runs.folder import ALONE
from . import intervals, provenance

TITLES = {"teacher": "teacher", ALONE: "student alone"}
HEADER = ("", "λ", "accuracy (%)", "minus alone", "95% interval", "p (Holm)", "best epoch (%)")
CAVEAT = (
    "Mean ± standard deviation over seeds of the last epoch's accuracy over all test examples; "
    "differences are paired by seed (same teacher, initialisation and batches), with 95% "
    "t-intervals; p is adjusted for the number of metrics (Holm). They measure what another seed "
    "would change, not another test set. The best epoch is chosen on the test set, so it flatters."
)


def sections(table: dict) -> dict[str, dict]:
    """Return the numbers of every data set, and of their average where there are several."""
    return table["datasets"] | ({"average": table["average"]} if table["average"] else {})


def title(name: str, found: dict) -> str:
    """Describe a data set, its networks and its protocol in one line."""
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


def rows(found: dict) -> list[list[str]]:
    """Write a data set's numbers as the header and rows of a table."""
    published = any(row["published"] for row in found["rows"].values())
    table = [[*HEADER, *["published (%)"] * published]]
    for name, row in found["rows"].items():
        difference = row["difference"] or {}
        cells = [row_name(name), row.get("coef") or "", mean_text(row["last"])]
        cells += [difference_text(difference["mean"]) if difference else ""]
        cells += [interval_text(difference.get("interval")) if difference else ""]
        cells += [
            intervals.p_text(difference["p_holm"]) if "p_holm" in difference else "",
            mean_text(row["best"]),
        ]
        table.append(cells + [f"{row['published']:.2f}" if row["published"] else ""] * published)
    return table


def row_name(row: str) -> str:
    """Name a row as a reader sees it."""
    return TITLES.get(row, row)


def mean_text(summary: dict) -> str:
    """Write mean and standard deviation, and the number of seeds where some diverged."""
    if summary["mean"] is None:
        return "diverged"
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.2f}"
    left = [value for value in summary["values"] if value is not None]
    missing = len(summary["values"]) - len(left)
    return f"{summary['mean']:.2f}{spread}" + (f" ({len(left)} seeds)" if missing else "")


def difference_text(mean: float | None) -> str:
    """Write a mean difference with its sign."""
    return "unknown" if mean is None else f"{mean:+.2f}"


def interval_text(interval: list[float] | None) -> str:
    """Write a 95% interval with its signs."""
    return f"[{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "unknown"


def sentence(found: dict) -> str:
    """Say in words which differences are statistically significant."""
    metrics = {name: row["difference"] for name, row in found["rows"].items() if name not in TITLES}
    n = len(found["rows"][ALONE]["last"]["values"])
    groups: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for name, difference in metrics.items():
        groups[intervals.verdict(difference)].append(name)
    words = {1: "above", -1: "below", 0: "not distinguishable from"}
    parts = [f"{words[k]} the student alone: {', '.join(v)}" for k, v in groups.items() if v]
    sure = [name for name, d in metrics.items() if intervals.verdict(d, "p_holm")]
    ordered = [p for p in found["pairs"] if intervals.verdict(p, "p_holm")]
    teacher = found["rows"]["teacher"]["difference"]
    return (
        f"By 95% intervals over {n} seeds: {'; '.join(parts) or 'no metric compared'}. After "
        f"adjustment for {len(metrics)} metrics: {', '.join(sure) or 'none'} significant. Of "
        f"{len(found['pairs'])} pairs of metrics {len(ordered)} differ significantly "
        "after adjustment"
        + "".join(f"; {_ordered(pair)}" for pair in ordered)
        + f". The teacher minus the student alone: {difference_text(teacher['mean'])} points, "
        f"{interval_text(teacher['interval'])}." + _diverged(found)
    )


def _diverged(found: dict) -> str:
    """Say which runs diverged, and what that does to the numbers."""
    runs = [
        f"{row_name(name)}, seed {seed} at step {step}"
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


def markdown(table: dict) -> list[str]:
    """Write a whole table in Markdown, as lines."""
    lines = ["# Teacher, student alone and each metric", "", "```bash", table["command"], "```", ""]
    lines += [f"{table['seeds']} seeds. {CAVEAT}", ""]
    datasets = sections(table)
    if table["average"]:
        lines += [*tables.markdown(_columns(table)), ""]
    for name, found in datasets.items():
        lines += [f"## {title(name, found)}", "", *tables.markdown(rows(found)), ""]
        lines += [sentence(found), ""]
    if any(row["published"] for d in datasets.values() for row in d["rows"].values()):
        lines += [
            "Published: KD2M (arXiv 2504.01757), one seed and another protocol (ImageNet-"
            "pretrained networks), so not to be compared with ours number by number.",
            "",
        ]
    lines += ["![Accuracies and differences to the student alone](table.png)", ""]
    return [*lines, provenance.sentence(table)]


def _columns(table: dict) -> list[list[str]]:
    """Write the paper's form: one column per data set, and the average."""
    datasets = sections(table)
    names = next(iter(datasets.values()))["rows"]
    return [
        ["", *(f"{name} (%)" for name in datasets)],
        *([row_name(n), *(mean_text(d["rows"][n]["last"]) for d in datasets.values())]
          for n in names),
    ]  # fmt: skip
