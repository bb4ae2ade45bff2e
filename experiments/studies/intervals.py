"""Statistics of a table: means over seeds, paired differences, Holm's adjustment."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95

Scores = ArrayLike | Sequence[float | None]


def summary(values: Scores) -> dict:
    """Summarise values: mean, standard deviation (over n - 1), the mean's 95% t-interval.

    The last two are None where n = 1. A value that is None, which a diverged run has, is left out;
    the mean of nothing is None.
    """
    x = np.asarray(values, float)
    x = x[~np.isnan(x)]
    if not len(x):
        return {"mean": None, "sd": None, "interval": None}
    sd = float(x.std(ddof=1)) if len(x) > 1 else None
    mean = float(x.mean())
    return {"mean": mean, "sd": sd, "interval": _interval(mean, sd, len(x))}


def paired(values: Scores, reference: Scores) -> dict:
    """Compare in pairs: mean difference, its 95% t-interval and two-sided p-value.

    A pair with None on one side is left out. One pair, or differences that are all the same, say
    nothing about their spread: then the interval and p are None.
    """
    difference = np.asarray(values, float) - np.asarray(reference, float)
    # Accuracies are counts over n: what differs by rounding alone is the same.
    found = summary(difference.round(9))
    if not found["sd"]:
        return {"mean": found["mean"], "sd": found["sd"], "interval": None, "p": None}
    n = np.count_nonzero(~np.isnan(difference))
    t = found["mean"] / (found["sd"] / math.sqrt(n))
    return {**found, "p": float(2 * stats.t.sf(abs(t), n - 1))}


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for their number (Holm, Scand. J. Statist. 1979); None stays None."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * p))
        adjusted[i] = highest
    return adjusted


def compare(scores: dict[str, list[float | None]], reference: Scores) -> dict[str, dict]:
    """Pair each with a reference by `paired`; p is adjusted for the number compared."""
    found = {name: paired(values, reference) for name, values in scores.items()}
    adjusted = holm([d["p"] for d in found.values()])
    return {name: {**d, "p_holm": p} for (name, d), p in zip(found.items(), adjusted, strict=True)}


def pairs(scores: dict[str, list[float | None]]) -> list[dict]:
    """Compare each with each other; p is adjusted for the number of pairs."""
    names = list(itertools.combinations(scores, 2))
    found = [paired(scores[a], scores[b]) for a, b in names]
    adjusted = holm([d["p"] for d in found])
    return [
        {"first": a, "second": b, **d, "p_holm": p}
        for (a, b), d, p in zip(names, found, adjusted, strict=True)
    ]


def verdict(difference: dict, p: str = "p") -> int:
    """Return the sign of a difference that is significant at the 5% level, else 0."""
    known = difference[p] is not None and difference[p] < 1 - LEVEL
    return int(np.sign(difference["mean"])) if known else 0


def p_text(p: float | None) -> str:
    """Write a p-value to three digits, for a table."""
    return "unknown" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _interval(mean: float, sd: float | None, n: int) -> list[float] | None:
    if sd is None:
        return None
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return [mean - half, mean + half]
