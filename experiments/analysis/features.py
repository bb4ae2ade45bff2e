"""Teacher and student features in the plane, and their distances in numbers."""

import pathlib

import numpy as np

from kd2m_jax import Outputs, losses

from ..common import figures, files, tables
from ..runs import report
from .finished import Finished, check_same_size, outputs

HEADER = ("", "silhouette", "W2² to teacher", "CW2² to teacher", "L2² to teacher", "accuracy (%)")


def write(run: Finished, examples: int, seed: int) -> str:
    """Write features.json and features.png into the run folder; returns the numbers as text."""
    dataset, folder = run.plan.dataset, run.folder.path
    images, labels = dataset.test
    kept = labels < len(figures.CLASSES)  # as many classes as there are distinct colours
    images, labels = images[kept][:examples], labels[kept][:examples]
    out = {k: outputs(model, dataset, images) for k, model in run.trained.items()}
    check_same_size(out)
    features = {name: np.asarray(one.features) for name, one in out.items()}
    numbers = {name: _numbers(out[name], out["teacher"], labels) for name in out}
    planes = {"PCA": _pca(features), "t-SNE": _tsne(features, seed)}
    content = {"examples": len(labels), "seed": seed, "networks": numbers}
    files.write_json(folder / "features.json", content)
    _figure(folder / "features.png", planes, labels, dataset.classes)
    rows = [
        (report.TITLES[k], *(f"{v:.3g}" if i < 4 else f"{v:.2f}" for i, v in enumerate(n.values())))
        for k, n in numbers.items()
    ]
    return tables.aligned([HEADER, *rows])


def _numbers(student: Outputs, teacher: Outputs, labels: np.ndarray) -> dict[str, float]:
    """Measure class separation, and exact squared distances to the teacher's features."""
    from sklearn.metrics import silhouette_score

    metrics = {name: losses.get_metric(name, solver="exact") for name in ("w2", "cw2")}
    metrics["l2"] = losses.get_metric("l2")
    return {
        "silhouette": float(silhouette_score(np.asarray(student.features), labels)),
        **{name: float(metric(student, teacher, labels)) for name, metric in metrics.items()},
        "accuracy": 100 * float(np.mean(np.argmax(np.asarray(student.logits), 1) == labels)),
    }


def _pca(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Project all features to the plane in which the teacher's vary most."""
    from sklearn.decomposition import PCA

    pca = PCA(2).fit(features["teacher"])
    return {name: pca.transform(z) for name, z in features.items()}


def _tsne(features: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Embed all three networks' features together."""
    from sklearn.manifold import TSNE

    together = np.concatenate(list(features.values()))
    perplexity = min(30.0, len(together) / 4)
    plane = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(together)
    return dict(zip(features, np.split(plane, len(features)), strict=True))


def _figure(path: pathlib.Path, planes: dict, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """Draw either student with the teacher, without and with distillation, in both planes."""
    figure, axes = figures.subplots(2, 2, figsize=(9, 8.6), sharex="row", sharey="row")
    colours = np.array(figures.CLASSES)[labels]
    for row, (method, plane) in zip(axes, planes.items(), strict=True):
        for axis, student in zip(row, ("student", "distilled"), strict=True):
            when = "without" if student == "student" else "with"
            for name, marker in (("teacher", "x"), (student, "o")):
                edge = {"linewidths": 0.8} if marker == "x" else {"linewidths": 0}
                axis.scatter(*plane[name].T, c=colours, s=14, marker=marker, alpha=0.7, **edge)
            for label in np.unique(labels):
                middle = np.median(plane["teacher"][labels == label], axis=0)
                box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8}
                axis.annotate(classes[label], middle, fontsize=8, bbox=box)
            axis.set_title(
                f"{when} distillation: teacher (x), {report.TITLES[student]} (o)", fontsize=9
            )
            axis.set_xlabel(f"{method}, first axis")
        row[0].set_ylabel(f"{method}, second axis")
    figures.finish(figure, path)
