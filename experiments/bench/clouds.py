"""Clouds on which solvers of transport differ: ordinary ones, and traps."""

import numpy as np

ORDINARY = ("related", "clustered", "confused", "unrelated")
TRAPS = (
    "collapsed", "both collapsed", "eight rows", "sparse ReLU", "rank 2", "one dimension",
    "near-identical", "one-hot teacher", "one-hot both", "integers", "permuted",
    "collapsed to 1e-5", "heavy tails", "uniform in 3 dimensions",
)  # fmt: skip


def clouds(kind: str, n: int, d: int = 64, classes: int = 10, seed: int = 0):
    """Draw student and teacher, float64 ``[n, d]``, and labels ``[n]``.

    "related": the student is the teacher plus 0.3 of noise. "clustered": both lie around the same
    class means. "confused": a tenth of the students is in another cluster, so that masses differ.
    "unrelated": no clusters on the student's side. The others have no classes.
    """
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, d))
    labels, basis = rng.integers(0, classes, (2, n)), rng.normal(size=(2, d))
    centres = 2 * rng.normal(size=(classes, d))
    wrong = np.where(rng.random(n) < 0.1, labels[1], labels[0])
    student, teacher = {
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
    return student, teacher, labels[0]
