"""The earlier methods' losses as their papers write them: float64, pair by pair, image by image.

Slow on purpose and shares nothing with the library.
"""

import numpy as np
import ot
from scipy.spatial.distance import cdist, pdist
from scipy.special import log_softmax, softmax


def kd(h_s, h_t, *, temperature, standardize=False):
    total = 0
    for s, t in zip(h_s, h_t, strict=True):
        if standardize:
            s, t = ((h - h.mean()) / h.std() for h in (s, t))
        p, q = softmax(t / temperature), softmax(s / temperature)
        total += (p * np.log(p / q)).sum()
    return temperature**2 * total / len(h_s)


def bandwidth(x, y, kind="mean"):
    """Sigma from the squared distances between distinct points of both clouds."""
    squared = pdist(np.concatenate([x, y]), "sqeuclidean")
    return np.sqrt({"mean": np.mean, "median": np.median}[kind](squared))


def kernel_matrix(x, y, kernel, *, sigma=None, degree=2, offset=1.0):
    if kernel == "linear":
        return x @ y.T
    if kernel == "polynomial":
        return (x @ y.T + offset) ** degree
    if kernel == "rbf":
        return np.exp(-cdist(x, y, "sqeuclidean") / (2 * sigma**2))
    return -cdist(x, y)


def mmd(x, y, kernel, **options):
    """With sigma given, so that a caller may freeze it."""

    def mean(a, b):
        return kernel_matrix(a, b, kernel, **options).mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def pool(image, h, w):
    """Average an image's map ``[H, W, c]`` over blocks to ``[h, w, c]``."""
    rows = np.split(image, h, axis=0)
    return np.array([[cell.mean((0, 1)) for cell in np.split(row, w, axis=1)] for row in rows])


def channels(image):
    """``[c, h w]``, each channel's map, of length 1 unless it is 0."""
    flat = image.reshape(-1, image.shape[-1]).T
    return np.array([row / np.linalg.norm(row) if row.any() else row for row in flat])


def nst(maps_s, maps_t, kernel, *, sigmas=None, **options):
    """One stage; the Gaussian's sigmas, one an image, may be frozen."""
    h, w = np.minimum(maps_s.shape[1:3], maps_t.shape[1:3])
    values = []
    for i, (s, t) in enumerate(zip(maps_s, maps_t, strict=True)):
        x, y = channels(pool(s, h, w)), channels(pool(t, h, w))
        if kernel == "rbf":
            options["sigma"] = bandwidth(x, y) if sigmas is None else sigmas[i]
        values.append(mmd(x, y, kernel, **options))
    return np.mean(values)


def nst_bandwidths(maps_s, maps_t):
    return [bandwidth(channels(s), channels(t)) for s, t in zip(maps_s, maps_t, strict=True)]


def class_cost(features, labels, classes, kappa=1.0):
    rows = min(np.bincount(labels, minlength=classes))
    groups = [features[labels == c][:rows] for c in range(classes)]
    groups = [g - g.mean(0) for g in groups]
    norm = np.linalg.norm
    cost = np.zeros((classes, classes))
    for a, x in enumerate(groups):
        for b, y in enumerate(groups):
            cka = norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
            cost[a, b] = 0 if a == b else 1 - np.exp(-kappa * (1 - cka))
    return cost


def wkd_l(h_s, h_t, labels, *, temperature, target_coef, cost, epsilon=0.05, n_iters=10):
    """Sinkhorn by POT, in the exponential domain, one example at a time."""
    total = 0
    for s, t, y in zip(h_s, h_t, labels, strict=True):
        others = np.arange(len(s)) != y
        a, b = (softmax(h[others] / temperature) for h in (s, t))
        c = cost[np.ix_(others, others)]
        plan = ot.sinkhorn(a, b, c, epsilon, numItermax=n_iters, stopThr=0, warn=False)
        target = -softmax(t)[y] * log_softmax(s)[y]
        total += (plan * c).sum() + target_coef * target
    return total / len(h_s)


def wkd_f(maps_s, maps_t, *, grid, gamma):
    total = 0
    for s, t in zip(maps_s, maps_t, strict=True):
        for row_s, row_t in zip(np.split(s, grid), np.split(t, grid), strict=True):
            columns = zip(np.split(row_s, grid, axis=1), np.split(row_t, grid, axis=1), strict=True)
            for cell_s, cell_t in columns:
                (m_s, d_s), (m_t, d_t) = gaussian(cell_s), gaussian(cell_t)
                total += gamma * ((m_s - m_t) ** 2).sum() + ((d_s - d_t) ** 2).sum()
    return total / (len(maps_s) * grid**2)


def gaussian(cell):
    """Mean and standard deviation of a cell's positions, channel by channel."""
    x = cell.reshape(-1, cell.shape[-1])
    var = x.var(0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1])
    return x.mean(0), np.sqrt(var + 1e-5)
