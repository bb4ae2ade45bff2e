"""Distances up to a rotation, and characteristic functions, as the textbook writes them: float64.

Slow on purpose and shares nothing with the library.
"""

import numpy as np
import scipy.integrate
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


def scf(z_s, z_t, directions, *, frequencies=16, unit=None):
    """Integrate over -5 to 5 by the trapezoidal rule, line by line; a unit given is frozen."""
    unit = line_unit(z_s, z_t) if unit is None else unit
    t = np.linspace(-5, 5, 2 * frequencies + 1)
    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    values = []
    for theta in directions.T:
        x, y = z_s @ theta / unit, z_t @ theta / unit
        phi_s, phi_t = (np.exp(1j * np.outer(t, a)).mean(1) for a in (x, y))
        values.append(scipy.integrate.trapezoid(density * np.abs(phi_s - phi_t) ** 2, t))
    return np.mean(values)


def sliced_mmd(z_s, z_t, directions):
    """Average the MMD^2 of each line with a Gaussian kernel, over all pairs."""
    unit = line_unit(z_s, z_t)

    def mean(a, b):
        return np.exp(-((a[:, None] - b[None, :]) ** 2) / 2).mean()

    lines = [(z_s @ theta / unit, z_t @ theta / unit) for theta in directions.T]
    return np.mean([mean(x, x) + mean(y, y) - 2 * mean(x, y) for x, y in lines])


def line_unit(z_s, z_t):
    centre = (z_s.mean(0) + z_t.mean(0)) / 2
    spreads = [((z - centre) ** 2).sum(1).mean() for z in (z_s, z_t)]
    return np.sqrt(np.mean(spreads) / z_s.shape[1])
