"""Costs on which assignment solvers get slow or wrong, by name."""

import numpy as np


def costs(n, seed=0):
    """Cost matrices by name, float64 ``[n, n]``; infinite ones are forbidden."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, 3))
    distances = ((x[:, None] - y[None]) ** 2).sum(-1)
    i, few = np.arange(n), max(1, n // 3)
    same = np.equal.outer(*[rng.integers(0, max(1, n // 4), n)] * 2)
    feasible = (rng.random((n, n)) < 0.3) | (np.eye(n)[rng.permutation(n)] > 0)
    duplicates = distances[rng.integers(0, few, n)]
    return {
        "uniform": rng.random((n, n)),
        "of both signs": 100 * rng.normal(size=(n, n)),
        "products": -x @ y.T,
        "far from zero": distances + 1e4,
        "small integers": rng.integers(0, 5, (n, n)),
        "binary": rng.integers(0, 2, (n, n)),
        "zero": np.zeros((n, n)),
        "ones": np.ones((n, n)),
        "rank 1": np.outer(i, i),
        "rank 1, reversed": np.outer(i, i[::-1]),
        "one wants all": np.minimum.outer(i, i),
        "on a line": np.abs(i[:, None] - rng.permutation(n)),
        "row plus column": rng.random((n, 1)) + rng.random(n)[None, :],
        "duplicate rows": duplicates,
        "duplicates on both sides": duplicates[:, rng.integers(0, few, n)],
        "skewed": rng.random((n, n)) ** 20,
        "classes": np.where(same, distances, np.inf),
        "classes with ties": np.where(same, np.round(distances), np.inf),
        "classes of one": np.where(np.eye(n) > 0, distances, np.inf),
        "sparse": np.where(feasible, distances, np.inf),
    } | {f"times {c:g}": c * distances for c in (1e-30, 1e-12, 1e12, 1e30)}


def broken(n, seed=0):
    """Cost matrices without an answer, by name."""
    rng = np.random.default_rng(seed)
    whole, i, middle = rng.random((n, n)), np.arange(n), n // 2
    mixed = np.where(rng.random((n, n)) < 0.3, np.inf, whole)
    return {
        "NaN": whole * np.nan,
        "infinity": whole + np.inf,
        "minus infinity": whole - np.inf,
        "one NaN": np.where(whole == whole.max(), np.nan, whole),
        "a row of NaN": np.where(i[:, None] == middle, np.nan, whole),
        "a row of negative NaN": np.where(i[:, None] == middle, -np.nan, whole),
        "a column of infinities": np.where(i == middle, np.inf, whole),
        "a row of minus infinity": np.where(i[:, None] == middle, -np.inf, whole),
        "NaN and infinities": np.where(rng.random((n, n)) < 0.2, np.nan, mixed),
        "no pairing": np.where((i[:, None] <= middle) & (i >= middle), np.inf, whole),
        "1e30 and its negative": np.where(whole < 0.5, 1e30, -1e30),
    }
