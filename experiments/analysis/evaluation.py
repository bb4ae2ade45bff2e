"""What a trained student is worth on test images, beside its teacher."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd2m_jax import predict
from kd2m_jax.internal import accuracy, calibration_error

from ..common import figures, files, tables
from ..runs.report import TITLES
from .trained import Trained

_TIMED = 20  # calls, of which the median counts


def write(student: Trained, teacher: Trained, examples: tuple[Any, np.ndarray]) -> str:
    """Write evaluation.json and confusion.png into the run folder; returns the tables as text."""
    images, labels = examples
    logits = {one.which: _logits(one, images) for one in (student, teacher)}
    numbers = {one.which: _numbers(one, logits[one.which], labels) for one in (student, teacher)}
    classes = {which: found.argmax(1) for which, found in logits.items()}
    agreement = float(np.mean(classes[student.which] == classes["teacher"]))
    confusion = _confusion(labels, classes[student.which], len(student.classes))
    recall = [float(row[i] / row.sum()) if row.sum() else None for i, row in enumerate(confusion)]
    content = {
        "examples": len(labels),
        "agreement": agreement,
        "networks": numbers,
        "classes": dict(zip(student.classes, recall, strict=True)),
        "confusion": confusion.tolist(),
    }
    files.write_json(student.folder.path / "evaluation.json", content)
    _figure(student, confusion)
    own, other = numbers[student.which], numbers["teacher"]
    rows = [
        ["", TITLES[student.which], TITLES["teacher"]],
        *([name, _text(name, own[name]), _text(name, other[name])] for name in own),
        ["agreement", f"{100 * agreement:.2f}%", ""],
    ]
    per_class = [["class", "images", "right"]]
    for name, row, share in zip(student.classes, confusion, recall, strict=True):
        per_class.append([name, str(row.sum()), "-" if share is None else f"{100 * share:.1f}%"])
    return "\n\n".join(
        [tables.aligned(rows), tables.aligned(per_class), _matrix(student, confusion)]
    )


def _logits(one: Trained, images: Any) -> np.ndarray:
    network = one.network  # of a part of the pictures at a time, which may not all fit
    parts = [predict(network, images[i : i + 500]) for i in range(0, len(images), 500)]
    return np.concatenate(parts)


def _numbers(one: Trained, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measure one network; latency and operations are those of one image."""

    @jax.jit
    def call(state, x):
        return nnx.merge(graph, state)(one.prepare(x)).logits

    graph, state = nnx.split(one.module)
    x = jnp.zeros((1, *one.shape), jnp.uint8)
    program = call.lower(state, x).compile()
    costs: Any = program.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    times = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        jax.block_until_ready(program(state, x))
        times.append(time.perf_counter() - start)
    of_many = {"top-5": 100 * accuracy(logits, labels, top=5)} if logits.shape[1] > 5 else {}
    return {
        "top-1": 100 * accuracy(logits, labels),
        **of_many,
        "calibration error": 100 * calibration_error(logits, labels),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(one.module, nnx.Param))),
        "MFLOPs per image": (costs or {}).get("flops", float("nan")) / 1e6,
        "ms per image": 1e3 * statistics.median(times),
    }


def _text(name: str, value: float) -> str:
    if name == "parameters":
        return f"{value:,}"
    return f"{value:.3g}" if " per " in name else f"{value:.2f}%"


def _confusion(labels: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """Return how many images of each class (row) were taken for each (column)."""
    found = np.zeros((count, count), int)
    np.add.at(found, (labels, predicted), 1)
    return found


def _matrix(student: Trained, confusion: np.ndarray) -> str:
    """Lay the confusion matrix out; of many classes the pairs that are most often confused."""
    names = student.classes
    if len(names) <= 10:
        rows = [[name, *map(str, row)] for name, row in zip(names, confusion.tolist(), strict=True)]
        return "Confusion (row: class, column: taken for)\n" + tables.aligned(
            [["", *(name[:10] for name in names)], *rows]
        )
    wrong = confusion - np.diag(np.diag(confusion))
    most = np.argsort(-wrong, axis=None)[:10]
    pairs = [divmod(int(place), len(names)) for place in most if wrong.flat[place]]
    rows = [[names[i], names[j], str(wrong[i, j])] for i, j in pairs]
    return tables.aligned([["class", "taken for", "images"], *rows], words=2)


def _figure(student: Trained, confusion: np.ndarray) -> None:
    """Draw the confusion matrix, each row as shares of its class."""
    count = len(student.classes)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = float(np.clip(0.35 * count + 2, 4, 14))
    figure, axis = figures.subplots(figsize=(side + 1, side))
    picture = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if count <= 40:
        names = [figures.plain(name, 14) for name in student.classes]
        axis.set_xticks(range(count), names, rotation=90, fontsize=8)
        axis.set_yticks(range(count), names, fontsize=8)
    if count <= 12:
        for (i, j), share in np.ndenumerate(shares):
            if confusion[i, j]:
                colour = "white" if share > 0.5 else "black"
                axis.text(j, i, str(confusion[i, j]), ha="center", va="center", color=colour)
    axis.set_xlabel(f"taken for, by the {TITLES[student.which]}")
    axis.set_ylabel("class")
    figure.colorbar(picture, ax=axis, label="share of the class", shrink=0.8)
    figures.finish(figure, student.folder.path / "confusion.png")
