"""Clouds and costs on which assignment solvers get slow or wrong, by name."""

import numpy as np

CLOUDS = (
    "related", "clustered", "confused", "unrelated", "collapsed", "both collapsed", "eight rows",
    "sparse ReLU", "rank 2", "one dimension", "near-identical", "one-hot teacher", "one-hot both",
    "integers", "permuted", "collapsed to 1e-5", "heavy tails", "uniform in 3 dimensions",
)  # fmt: skip


def clouds(kind, n, d=64, seed=0):
    """Student and teacher, float64 ``[n, d]``."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, d))
    labels, basis = rng.integers(0, 10, (2, n)), rng.normal(size=(2, d))
    centres = 2 * rng.normal(size=(10, d))
    wrong = np.where(rng.random(n) < 0.1, labels[1], labels[0])
    return {
        "related": lambda: (centres[labels[0]] + y + 0.3 * x, centres[labels[0]] + y),
        "clustered": lambda: (centres[labels[0]] + x, centres[labels[0]] + y),
        "confused": lambda: (centres[wrong] + x, centres[labels[0]] + y),
        "unrelated": lambda: (x, centres[labels[0]] + y),
        "collapsed": lambda: (0 * x + x[0], y),
        "both collapsed": lambda: (0 * x + x[0], 0 * y + y[0]),
        "eight rows": lambda: (x[rng.integers(0, 8, n)], y),
        "sparse ReLU": lambda: (np.maximum(x - 1.5, 0), np.maximum(y - 1.5, 0)),
        "rank 2": lambda: (x[:, :2] @ basis, y[:, :2] @ basis),
        "one dimension": lambda: (x[:, :1], y[:, :1]),
        "near-identical": lambda: (y + 1e-3 * x, y),
        "one-hot teacher": lambda: (x, np.eye(d)[labels[0]]),
        "one-hot both": lambda: (np.eye(d)[labels[0]], np.eye(d)[labels[1]]),
        "integers": lambda: (np.round(x), np.round(y)),
        "permuted": lambda: (y[rng.permutation(n)], y),
        "collapsed to 1e-5": lambda: (x[:1] + 1e-5 * x, y),
        "heavy tails": lambda: tuple(rng.standard_t(1.5, size=(2, n, d))),
        "uniform in 3 dimensions": lambda: tuple(rng.random((2, n, 3))),
    }[kind]()


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
