"""Distances up to a rotation, and characteristic functions, as the textbook writes them: float64.

Slow on purpose and shares nothing with the library.
"""

import numpy as np
import scipy.linalg


def centred(z):
    return (z - z.mean(0)) / np.sqrt(len(z))


def procrustes(z_s, z_t):
    """Turn the wider cloud's rows onto the other's, padded to its size, and compare the pairs."""
    x, y = centred(z_s), centred(z_t)
    d = max(x.shape[1], y.shape[1])
    x, y = (np.pad(z, ((0, 0), (0, d - z.shape[1]))) for z in (x, y))
    turn, _ = scipy.linalg.orthogonal_procrustes(y, x)
    return ((x - y @ turn) ** 2).sum()


def gram(z_s, z_t):
    """Compare the inner products of all pairs of examples."""
    x, y = centred(z_s), centred(z_t)
    return ((x @ x.T - y @ y.T) ** 2).sum()


def cka(z_s, z_t):
    """Kornblith et al., equation 3, by the two matrices of inner products, each centred twice."""
    n = len(z_s)
    centre = np.eye(n) - np.full((n, n), 1 / n)

    def hsic(k, other):
        return np.trace(k @ centre @ other @ centre) / (n - 1) ** 2

    k, other = z_s @ z_s.T, z_t @ z_t.T
    return 1 - hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))
