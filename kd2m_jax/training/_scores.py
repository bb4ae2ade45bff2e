"""What a trained network is worth beyond its accuracy: scores over a whole test set."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from kd2m_jax._outputs import Outputs

# One of SCORES, or a function (Outputs, labels) -> number of the caller's own.
Score: TypeAlias = str | Callable[[Outputs, np.ndarray], Any]

_BINS = 15


def accuracy(logits: np.ndarray, labels: np.ndarray, top: int = 1) -> float:
    """Return the share of the labelled rows whose class is among the ``top`` largest logits."""
    known = labels >= 0
    logits, labels = logits[known], labels[known]
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    # Of equal logits the first counts, as argmax has it.
    before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    return float(np.mean(((logits > own) | before).sum(1) < top))


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error over the labelled rows (Guo et al., ICML 2017).

    ``sum_b n_b / n |accuracy of bin b - mean confidence of bin b|`` over 15 equal bins of the
    largest probability.
    """
    known = labels >= 0
    logits, labels = np.asarray(logits[known], np.float64), labels[known]
    p = np.exp(logits - logits.max(1, keepdims=True))
    confidence = p.max(1) / p.sum(1)
    right = logits.argmax(1) == labels
    place = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(place, right - confidence, _BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _logits(out: Outputs, whose: str) -> np.ndarray:
    if out.logits is None:
        raise ValueError(f"{whose} has no logits, which a score of eval_data needs")
    return np.asarray(out.logits)


# By name, of (student, teacher, labels).
SCORES: dict[str, Callable[[Outputs, Any, np.ndarray], float]] = {
    "accuracy": lambda s, t, labels: accuracy(_logits(s, "the student"), labels),
    "top-5": lambda s, t, labels: accuracy(_logits(s, "the student"), labels, top=5),
    "ece": lambda s, t, labels: calibration_error(_logits(s, "the student"), labels),
    "agreement": lambda s, t, labels: float(
        np.mean(_logits(s, "the student").argmax(1) == _logits(t, "the teacher").argmax(1))
    ),
}


def named(scores: Sequence[Score], *, has_data: bool, own_task: bool) -> dict[str, Score]:
    """Return scores by their keys in the records; ValueError for what is none."""
    if isinstance(scores, str) or callable(scores):
        scores = [scores]
    if scores and not has_data:
        raise ValueError("metrics are scores of eval_data, and there is none")
    found: dict[str, Score] = {}
    for score in scores:
        name = score if isinstance(score, str) else getattr(score, "__name__", None)
        if isinstance(score, str) and score not in SCORES:
            raise ValueError(
                f"metrics are functions of (Outputs, labels), or of {', '.join(SCORES)}: got "
                f"{score!r}"
            )
        if name is None or not name.replace("-", "_").isidentifier():
            raise ValueError(f"a function among metrics needs a name: def it, got {score!r}")
        key = f"test_{name.replace('-', '_')}"
        if key in found or key == "test_loss" or (key == "test_accuracy" and not own_task):
            raise ValueError(f"there are two scores {key}")
        found[key] = score
    return found


def scored(scores: dict[str, Score], student: Outputs, teacher: Any, labels: Any) -> dict:
    """Compute scores over a whole test set."""
    found = {}
    for key, score in scores.items():
        if isinstance(score, str):
            found[key] = SCORES[score](student, teacher, labels)
            continue
        value = np.asarray(score(student, labels))
        if value.size != 1:
            raise ValueError(f"metrics: {key} must be one number, got shape {list(value.shape)}")
        found[key] = float(value.reshape(()))
    return found
