"""From a run folder to its table, its curves and report.md. No JAX: it reads files."""

import json
import pathlib

from experiments._common.folder import read_metrics
from experiments.common import tables
from experiments.common.figures import PHASES, finish, plt

TITLES = {"teacher": "teacher", "student": "student alone", "distilled": "distilled student"}
HEADER = ("", "network", "parameters", "test accuracy", "best epoch")


def rows(path: str | pathlib.Path) -> list[tuple[str, ...]]:
    """The final table: one row a phase, accuracies in percent over all test examples."""
    config = json.loads((pathlib.Path(path) / "config.json").read_text())
    lines = read_metrics(path)
    table = []
    for phase, title in TITLES.items():
        scores = [r["test_accuracy"] for r in lines if r["phase"] == phase and "test_accuracy" in r]
        if scores:
            which = "teacher" if phase == "teacher" else "student"
            best = max(scores)
            table.append(
                (
                    title,
                    config[which],
                    f"{config['parameters'][which]:,}",
                    f"{100 * scores[-1]:.2f}%",
                    f"{100 * best:.2f}% ({scores.index(best) + 1})",
                )
            )
    return table


def text_table(path: str | pathlib.Path) -> str:
    """The final table for a terminal."""
    return tables.aligned([HEADER, *rows(path)], words=2)


def write(path: str | pathlib.Path) -> None:
    """Write report.md and curves.png into a run folder."""
    path = pathlib.Path(path)
    config = json.loads((path / "config.json").read_text())
    env = json.loads((path / "env.json").read_text())
    _curves(path)
    title = f"{config['dataset']}: {config['teacher']} to {config['student']}"
    out = [f"# {title}, metric {config['metric']}", ""]
    out += tables.markdown([HEADER, *rows(path)], words=2)
    out += [
        "",
        "Test accuracy is that of the last epoch, over all test examples; the best epoch's is "
        "chosen on the same test set, so it flatters.",
        "",
        "![Accuracy and loss of the three networks](curves.png)",
        "",
        "## Configuration",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in config.items()),
        "",
        "## Environment",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _environment(env)),
        "",
    ]
    (path / "report.md").write_text("\n".join(out))


def _environment(env: dict):
    """The lines of env.json, flat."""
    flat = {k: v for k, v in env.items() if k not in ("packages", "images_per_second", "earlier")}
    yield from {**flat, **env["packages"]}.items()
    for phase, speed in env["images_per_second"].items():
        yield f"images/s, {TITLES[phase]}, evaluations included", f"{speed:,}"
    for other in env.get("earlier", []):
        yield "begun with", ", ".join(f"{name} {value}" for name, value in other.items())


def _curves(path: pathlib.Path) -> None:
    """Test accuracy, task loss and distance against the epoch."""
    lines = read_metrics(path)
    config = json.loads((path / "config.json").read_text())
    panels = [("test_accuracy", "test accuracy (%)"), ("task_loss", "cross-entropy (nats)")]
    if any("distillation_loss" in r for r in lines):
        panels.append(("distillation_loss", f"{config['metric']} to the teacher"))
    phases = {phase: _with_epochs([r for r in lines if r["phase"] == phase]) for phase in PHASES}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3), squeeze=False)
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for phase, colour in PHASES.items():
            points = [(epoch, r[key]) for epoch, r in phases[phase] if key in r]
            if points:
                x, y = zip(*points, strict=True)
                if key == "test_accuracy":
                    y = [100 * v for v in y]
                marker = "o" if len(points) == 1 else None
                axis.plot(x, y, color=colour, label=TITLES[phase], marker=marker, linewidth=1.5)
        if key != "test_accuracy" and all(v > 0 for line in axis.lines for v in line.get_ydata()):
            axis.set_yscale("log")
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
    axes[0][0].legend(frameon=False, fontsize=8)
    finish(figure, path / "curves.png")


def _with_epochs(records: list[dict]) -> list[tuple[float, dict]]:
    """A phase's records, each with how many epochs were done at it, in fractions."""
    per_epoch = next((r["step"] for r in records if "test_accuracy" in r), 0)
    return [(r["step"] / per_epoch if per_epoch else r["epoch"], r) for r in records]
