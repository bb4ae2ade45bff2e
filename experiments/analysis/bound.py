"""The theorem's chain over a run's training, which is repeated epoch by epoch and measured."""

import itertools
import math
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from kd2m_jax import Outputs, fit, theory

from ..common import figures, files, tables
from ..data.pictures import for_fit
from ..runs import report
from ..runs.build import Matching
from .finished import Finished, check_same_size, outputs

# The chain holds to about 3e-4 in float32 (theory.bound).
ROUNDING = 5e-4


def write(run: Finished, points: int, examples: int) -> str:
    """Write bound.json and bound.png into the run folder; returns the findings in words."""
    dataset, folder = run.plan.dataset, run.folder.path
    images, labels = (array[:examples] for array in dataset.test)
    teacher = outputs(run.trained["teacher"], dataset, images)
    check_same_size(
        {"teacher": teacher, "student": outputs(run.trained["student"], dataset, images)}
    )
    sigma = bandwidth(np.asarray(teacher.features))
    measured = {
        phase: [
            {"epoch": epoch, **measure(outputs(model, dataset, images), teacher, labels, sigma)}
            for epoch, model in over_training(run, phase, points)
        ]
        for phase in ("student", "distilled")
    }
    content = {"examples": len(labels), "bandwidth": sigma, "points": measured}
    files.write_json(folder / "bound.json", content)
    _figure(folder / "bound.png", measured, sigma)
    broken = [f"{k} at epoch {p['epoch']:g}" for k, ps in measured.items() for p in ps
              if not in_order(p)]  # fmt: skip
    count = sum(map(len, measured.values()))
    return (
        f"gap <= W <= L2 holds at {count - len(broken)} of {count} points"
        + (f", not for {', '.join(broken)}" if broken else "")
        + f" (RBF kernel of bandwidth {sigma:.3g}, {len(labels)} test examples, exact plan).\n"
        + tables.aligned(_rows(measured))
    )


def bandwidth(features: np.ndarray) -> float:
    """Return the teacher features' median distance, at least 1 so that phi is 1-Lipschitz."""
    squared = np.sum(features**2, 1)
    distances = squared[:, None] + squared - 2 * features @ features.T
    return max(1.0, math.sqrt(max(0.0, float(np.median(distances)))))


def measure(student: Outputs, teacher: Outputs, labels: np.ndarray, sigma: float) -> dict:
    """Measure the chain, and the gap of the real classifiers' cross-entropies in nats."""
    chain = theory.bound(student.features, teacher.features, bandwidth=sigma)
    risks = [_cross_entropy(np.asarray(out.logits, float), labels) for out in (student, teacher)]
    return {k: float(v) for k, v in chain._asdict().items()} | {
        "cross_entropy_gap": abs(risks[0] - risks[1])
    }


def in_order(point: dict) -> bool:
    """Tell whether gap <= W <= L2 <= Euclidean L2, up to rounding."""
    chain = [point[k] for k in ("gap", "w", "l2", "euclidean_l2")]
    return all(a <= b + ROUNDING for a, b in itertools.pairwise(chain))


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    top = logits.max(1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    return float(np.mean(log_sum - logits[np.arange(len(labels)), labels]))


def over_training(run: Finished, phase: str, points: int) -> Iterator[tuple[float, Any]]:
    """Yield (epoch, network) before training, after some epochs and at the end.

    The run is repeated with its configuration, from checkpoint to checkpoint. On the CPU this gives
    the same bits as in one go.
    """
    plan, config = run.plan, run.plan.config
    # Denser at the beginning, where more happens: epochs 1 to the last, evenly in the logarithm.
    epochs = np.unique(np.geomspace(1, config.epochs, points).round().astype(int))
    stops = sorted({int(min(e * plan.steps_per_epoch, plan.steps)) for e in epochs})
    fresh = plan.distilled if phase == "distilled" else plan.student
    matching = plan.matching(run.trained["teacher"]) if phase == "distilled" else Matching()
    data = for_fit(plan.dataset.train, plan.config.batch_size, plan.config.seed)
    yield 0.0, _evaluated(plan.student)
    with tempfile.TemporaryDirectory() as folder:
        for stop in tqdm(stops, desc=report.TITLES[phase], unit=" points"):
            options = plan.options
            options["max_steps"] = stop
            result = fit(fresh, data, checkpoint_dir=folder, **options, **matching)
            yield stop / plan.steps_per_epoch, result.student


def _evaluated(model):
    model.eval()
    return model


def _rows(measured: dict) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("", "epoch", "gap", "W", "L2", "cross-entropy gap (nats)")]
    for phase, points in measured.items():
        for p in (points[0], points[-1]):
            numbers = (f"{p[k]:.4f}" for k in ("gap", "w", "l2", "cross_entropy_gap"))
            rows.append((report.TITLES[phase], f"{p['epoch']:g}", *numbers))
    return rows


def _figure(path: pathlib.Path, measured: dict, sigma: float) -> None:
    """Draw the chain above the real classifiers' gap; one column per student."""
    figure, axes = figures.subplots(2, 2, figsize=(8, 5.6), sharex=True, sharey="row")
    lines = {
        "l2": ("L2", figures.BLUE, "o"),
        "w": ("W", figures.ORANGE, "s"),
        "gap": ("gap", figures.GREEN, "^"),
    }
    for i, (phase, points) in enumerate(measured.items()):
        epochs = [p["epoch"] for p in points]
        for key, (label, colour, marker) in lines.items():
            axes[0][i].plot(epochs, [p[key] for p in points], marker=marker, color=colour,
                            label=label, markersize=4)  # fmt: skip
        axes[1][i].plot(epochs, [p["cross_entropy_gap"] for p in points], "D-", color=figures.PINK,
                        markersize=4)  # fmt: skip
        axes[0][i].set_title(report.TITLES[phase], fontsize=10)
        axes[1][i].set_xlabel("epoch")
    axes[0][0].set_ylabel(f"distance in H (no unit, σ = {sigma:.3g})")
    axes[0][0].legend(frameon=False, fontsize=8)
    axes[1][0].set_ylabel("cross-entropy gap (nats)\nnot covered by the theorem")
    figures.finish(figure, path)
