"""Divergences, sliced and Gromov distances once more: float64 NumPy and POT, nothing shared."""

import itertools

import numpy as np
import ot
import scipy.optimize
from reference.oracles import distances
from scipy.special import logsumexp


def scale(*costs):
    """Return what epsilon is relative to: a bound of the mean cost, at least 0.1% of the mean.

    The better of two dual values, each a minimum over rows and columns.
    """
    values = []
    for first in (lambda c: c, lambda c: c.T):
        rows = [first(c).min(1) for c in costs]
        columns = [(first(c) - r[:, None]).min(0) for c, r in zip(costs, rows, strict=True)]
        values.append(np.mean([r.mean() + c.mean() for r, c in zip(rows, columns, strict=True)]))
    return max(*values, 1e-3 * np.mean([c.mean() for c in costs]))


def entropic_cost(cost, reg):
    """``min_P <P, C> + reg KL(P | a b)`` between uniform weights: its semi-dual, by L-BFGS."""

    def minus_semidual(g):
        z = (g[None, :] - cost) / reg
        log_mass = logsumexp(z, axis=1, keepdims=True)
        value = -reg * (log_mass.mean() - np.log(len(g))) + g.mean()
        return -value, np.exp(z - log_mass).mean(0) - 1 / len(g)

    solution = scipy.optimize.minimize(
        minus_semidual,
        cost.min(0),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-16, "gtol": 1e-9, "maxcor": 30},
    )
    return -solution.fun


def divergence(x, y, reg, pair_costs=distances):
    """Compute the Sinkhorn divergence at a given strength of the entropy."""
    cross, own, other = (entropic_cost(pair_costs(*p), reg) for p in ((x, y), (x, x), (y, y)))
    return cross - (own + other) / 2


def gromov_objective(x, y, plan):
    """``sum_ijkl (|x_i - x_k| - |y_j - y_l|)^2 P_ij P_kl``, all n^2 m^2 terms."""
    d_s, d_t = distances(x, x) ** 0.5, distances(y, y) ** 0.5
    total = 0.0
    for i, k in itertools.product(range(len(x)), repeat=2):
        total += plan[i] @ (d_s[i, k] - d_t) ** 2 @ plan[k]
    return total


def gromov(x, y, start=None):
    """POT's local minimum from the product of the weights, or from another start."""
    d_s, d_t = distances(x, x) ** 0.5, distances(y, y) ** 0.5
    return ot.gromov.gromov_wasserstein2(d_s, d_t, G0=start, max_iter=200)


def sliced(x, y, projections=5_000, seed=0):
    root = ot.sliced.sliced_wasserstein_distance(x, y, n_projections=projections, seed=seed)
    return root**2


def chain(x, y, bandwidth):
    """gap, w, l2, mmd, euclidean w2 and l2, from the definitions."""

    def kernel(p, q):
        return np.exp(-distances(p, q) / (2 * bandwidth**2))

    def risk(z):  # of the unnormalised witness
        return kernel(z, x).mean() - kernel(z, y).mean()

    mmd = max(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean(), 0) ** 0.5
    ground = np.sqrt(np.maximum(2 - 2 * kernel(x, y), 0))
    weights = np.full(len(x), 1 / len(x))
    w2 = ot.emd2(weights, weights, distances(x, y)) ** 0.5
    l2 = np.linalg.norm(x - y) / len(x) ** 0.5
    return {
        "gap": abs(risk(x) - risk(y)) / mmd if mmd else 0.0,
        "w": ot.emd2(weights, weights, ground),
        "l2": (np.diag(ground) ** 2).mean() ** 0.5,
        "mmd": mmd,
        "euclidean_w2": w2,
        "euclidean_l2": l2,
    }
