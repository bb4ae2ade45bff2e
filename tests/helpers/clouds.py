"""Feature clouds as networks make them, and as they go wrong."""

import numpy as np


def draw(kind, n, d, *, classes=4, seed=0):
    """Student features, teacher features (float64 [n, d]) and labels [n]."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    noise = lambda: rng.normal(size=(n, d))  # noqa: E731
    centres = 2 * rng.normal(size=(classes, d))
    if kind == "gaussian":
        return noise(), noise() + 0.3, labels
    if kind == "clustered":
        moved = centres + 0.2 * rng.normal(size=(classes, d))
        return centres[labels] + 0.3 * noise(), moved[labels] + 0.3 * noise(), labels
    if kind == "power-law":
        scale = np.arange(1, d + 1) ** -1.0
        turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
        return noise() * scale, 0.5 * (noise() * scale) @ turn + 0.5 * noise() * scale, labels
    if kind == "nearly matched":  # ReLU features of a student that has almost converged
        teacher = np.maximum(centres[labels] + 0.5 * noise(), 0)
        return np.maximum(teacher + 0.1 * noise(), 0), teacher, labels
    raise ValueError(kind)


KINDS = ("gaussian", "clustered", "power-law", "nearly matched")
