"""The losses once more, as the textbook writes them: float64 NumPy, SciPy and POT, class by class.

Slow on purpose and shares nothing with the library.
"""

import numpy as np
import ot
import scipy.linalg
from scipy.special import log_softmax


def distances(x, y):
    """[n, m] squared Euclidean distances."""
    return ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def by_class(distance, x, y, labels, **options):
    """Average a distance within the class over the classes present."""
    return np.mean([distance(x[labels == c], y[labels == c], **options) for c in np.unique(labels)])


def plan(cost):
    """Compute the exact plan between uniform weights, by network simplex."""
    n, m = cost.shape
    return ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost)


def w2(x, y):
    cost = distances(x, y)
    return (plan(cost) * cost).sum()


def conditional_plan(x, y, labels):
    """[n, n] block matrix of the classes' exact plans, each class weighing 1/K."""
    whole = np.zeros((len(x), len(y)))
    classes = np.unique(labels)
    for c in classes:
        rows = np.flatnonzero(labels == c)
        whole[np.ix_(rows, rows)] = plan(distances(x[rows], y[rows])) / len(classes)
    return whole


def label_cost(h_s, h_t, kind):
    log_s, log_t = log_softmax(h_s, axis=1), log_softmax(h_t, axis=1)
    cost = np.empty((len(h_s), len(h_t)))
    for i in range(len(h_s)):
        for j in range(len(h_t)):
            p = np.exp(log_t[j])
            cost[i, j] = {
                "cross_entropy": -(p * log_s[i]).sum(),
                "kl": (p * (log_t[j] - log_s[i])).sum(),
                "sqeuclidean": ((h_s[i] - h_t[j]) ** 2).sum(),
            }[kind]
    return cost


def jw2(x, y, h_s, h_t, *, beta, kind):
    cost = distances(x, y) + beta * label_cost(h_s, h_t, kind)
    return (plan(cost) * cost).sum()


def covariance(x):
    centred = x - x.mean(0)  # NumPy 2.0's np.cov takes a single row for a column
    return centred.T @ centred / len(x)


def sqrtm(a):
    """Square root of a symmetric positive semi-definite matrix, rounding below zero cut off."""
    values, vectors = np.linalg.eigh(a)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def gaussian_w2(x, y, *, kind="full"):
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    if kind == "diagonal":
        return gap + ((x.std(0) - y.std(0)) ** 2).sum()
    p, q = covariance(x), covariance(y)
    root = sqrtm(p)
    return gap + np.trace(p) + np.trace(q) - 2 * np.trace(sqrtm(root @ q @ root))


def ridge(x, y, shrinkage):
    d = x.shape[1]
    return shrinkage * (np.trace(covariance(x)) + np.trace(covariance(y))) / (2 * d)


def gaussian_kl(x, y, *, s, kind="full", direction="student_teacher"):
    """With the amount s added to the diagonals given, so that a caller may freeze it."""
    if direction == "teacher_student":
        x, y = y, x
    d = x.shape[1]
    p, q = covariance(x) + s * np.eye(d), covariance(y) + s * np.eye(d)
    if kind == "diagonal":
        p, q = np.diag(np.diag(p)), np.diag(np.diag(q))
    gap = y.mean(0) - x.mean(0)
    inverse = scipy.linalg.inv(q)
    log_dets = np.linalg.slogdet(q)[1] - np.linalg.slogdet(p)[1]
    return 0.5 * (np.trace(inverse @ p) + gap @ inverse @ gap - d + log_dets)


def directional_derivative(f, x, direction, step=1e-5):
    """Central finite difference of f at x along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def matched(p, q):
    """``[n, n]``, the polar factor that pairs rows as Gaussians do, without null directions."""
    u, s, vt = np.linalg.svd(p @ q.T)
    return (u * (s > 1e-9 * max(s[0], 1e-300))) @ vt


def transported(p, q):
    """``[n, n]``, the exact plan, as a matrix of ones."""
    return len(p) * plan(distances(p, q))


def rotation(x, y, labels, couple, ties):
    """Return both clouds about their centres, the second one turned onto the first, and the turn.

    It is that of the class means, then that of means and coupling, class by class.
    """
    classes = [labels == c for c in np.unique(labels)]
    means_x, means_y = (np.array([z[c].mean(0) for c in classes]) for z in (x, y))
    x, y = x - means_x.mean(0), y - means_y.mean(0)
    between = (means_y - means_y.mean(0)).T @ (means_x - means_x.mean(0)) / len(classes)
    u, s, vt = np.linalg.svd(between)
    r = (s > 1e-9).sum()
    turn = u[:, :r] @ vt[:r] + ties * np.eye(x.shape[1])
    cross = between
    for c in classes:
        p, q = x[c] - x[c].mean(0), y[c] - y[c].mean(0)
        cross = cross + q.T @ couple(p, q @ turn).T @ p / (len(p) * len(classes))
    # What is left open stays as it is.
    turn, _ = scipy.linalg.polar(cross + 1e-8 * np.linalg.norm(cross) * np.eye(len(cross)))
    return x, y @ turn, turn
