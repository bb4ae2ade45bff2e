"""A run folder's table, its curves and its report.md. No JAX: this reads files."""

import pathlib

from ..common import files, tables
from ..common.figures import PHASES, finish, subplots
from .folder import RunFolder

TITLES = {"teacher": "teacher", "student": "student alone", "distilled": "distilled student"}
HEADER = ("", "network", "parameters", "test accuracy", "best epoch")


def rows(folder: RunFolder) -> list[tuple[str, ...]]:
    """Return the final table: one row per phase, accuracies in percent over all test examples."""
    config, lines = folder.config, folder.records
    table = []
    for phase, title in TITLES.items():
        scores = [r["test_accuracy"] for r in lines if r["phase"] == phase and "test_accuracy" in r]
        if scores:
            which = "teacher" if phase == "teacher" else "student"
            best = max(scores)
            table.append(
                (
                    title,
                    getattr(config, which),
                    f"{config.parameters[which]:,}",
                    f"{100 * scores[-1]:.2f}%",
                    f"{100 * best:.2f}% ({scores.index(best) + 1})",
                )
            )
    return table


def text_table(folder: RunFolder) -> str:
    """Lay out the final table for a terminal."""
    return tables.aligned([HEADER, *rows(folder)], words=2)


def write(folder: RunFolder) -> None:
    """Write report.md and curves.png into a run folder."""
    config = folder.config
    _curves(folder.records, config.metric, folder.curves)
    title = f"{config.dataset}: {config.teacher} to {config.student}"
    out = [f"# {title}, metric {config.metric}", ""]
    out += tables.markdown([HEADER, *rows(folder)], words=2)
    if "early_stop" in (config.options or {}):
        out += ["", "The test images also decided when to stop (--early-stop)."]
    out += [
        "",
        "Test accuracy is the last epoch's, over all test examples. The best epoch is chosen on "
        "the same test set, so its accuracy flatters.",
        "",
        "![Accuracy and loss of the three networks](curves.png)",
        "",
        "## Configuration",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in config.to_json().items()),
        "",
        "## Environment",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _environment(folder.environment)),
        "",
    ]
    files.write(folder.report, "\n".join(out))


def _environment(env: dict):
    """Yield the lines of env.json, flat."""
    apart = ("packages", "images_per_second", "earlier", "solver")
    flat = {k: v for k, v in env.items() if k not in apart}
    flat |= {f"solver of {term}": solver for term, solver in env.get("solver", {}).items()}
    yield from {**flat, **env["packages"]}.items()
    for phase, speed in env["images_per_second"].items():
        yield f"images/s, {TITLES[phase]}, evaluations included", f"{speed:,}"
    for other in env.get("earlier", []):
        yield "begun with", ", ".join(f"{name} {value}" for name, value in other.items())


def _curves(lines: list[dict], metric: str, file: pathlib.Path) -> None:
    """Draw test accuracy, task loss and distance against the epoch."""
    panels = [("test_accuracy", "test accuracy (%)"), ("task_loss", "cross-entropy (nats)")]
    if any("distillation_loss" in r for r in lines):
        panels.append(("distillation_loss", f"{metric} to the teacher"))
    phases = {phase: _with_epochs([r for r in lines if r["phase"] == phase]) for phase in PHASES}
    figure, axes = subplots(1, len(panels), figsize=(3.6 * len(panels), 3), squeeze=False)
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
    finish(figure, file)


def _with_epochs(records: list[dict]) -> list[tuple[float, dict]]:
    """Pair each of a phase's records with the epochs that were done by then, in fractions."""
    per_epoch = next((r["step"] for r in records if "test_accuracy" in r), 0)
    return [(r["step"] / per_epoch if per_epoch else r["epoch"], r) for r in records]
