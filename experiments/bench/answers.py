"""Whether a loss gave the right answer, so that no time stands without it."""

from collections.abc import Callable

import jax
import numpy as np

from kd2m_jax import Outputs, losses

TRANSPORT_LIMIT, GAUSSIAN_LIMIT = 0.01, 0.001
# POT's network simplex takes minutes beyond.
EXACT_UP_TO = 2048


def answer(name: str, student: Outputs, teacher: Outputs, labels, **options) -> dict:
    """Return one loss's columns: iterations, distance from a slow oracle, verdict.

    Transport: converged and within 1% of the exact cost; for more samples than an exact solver
    takes, converged. Gaussian: within 0.1% of the textbook form in float64. Empty for a loss that
    has no iterations or rounding to get wrong.
    """
    name = name.replace("_", "-")
    metric = losses.get_metric(name, **options)
    conditional = name in ("cw2", "gaussian-cw2", "gaussian-ckl")
    x, y = (np.asarray(out.features, np.float64) for out in (student, teacher))
    parts = [labels == c for c in np.unique(labels)] if conditional else [slice(None)]
    if name in ("w2", "cw2", "jw2", "lohit"):
        value, info = metric_with_info(metric, student, teacher, labels)
        right = bool(info.converged)
        columns: dict = {"iterations": int(info.n_iters)}
        if max(len(x[p]) for p in parts) <= EXACT_UP_TO:
            if name == "jw2":
                exact = _exact_jw2(student, teacher)
            else:
                exact = np.mean([exact_w2(x[p], y[p]) for p in parts])
            off = float(value) / float(exact) - 1
            right = right and abs(off) <= TRANSPORT_LIMIT
            columns["off by"] = f"{100 * off:+.2f}%"
        return columns | {"answer": verdict(right)}
    textbook: Callable | None = {
        "gaussian-w2": textbook_gaussian_w2,
        "gaussian-cw2": textbook_gaussian_w2,
        "gaussian-kl": textbook_gaussian_kl,
        "gaussian-ckl": textbook_gaussian_kl,
    }.get(name)
    if textbook is None:
        return {}
    if options.get("covariance") == "diagonal":
        textbook = diagonal_gaussian_w2
    ridge = 0.1 * (x.var(0).mean() + y.var(0).mean()) / 2  # the losses' default shrinkage
    expected = float(np.mean([textbook(x[p], y[p], ridge) for p in parts]))
    off = float(metric(student, teacher, labels)) / expected - 1
    right = abs(off) <= GAUSSIAN_LIMIT
    return {"off by": f"{100 * off:+.4f}%", "answer": verdict(right)}


def verdict(right: bool) -> str:
    """Say in one word whether an answer is right."""
    return "right" if right else "WRONG"


def metric_with_info(metric, student: Outputs, teacher: Outputs, labels):
    """Return a transport metric's value and `TransportInfo`."""
    given: list = [student.features, teacher.features]
    if "labels" in metric.needs:
        given.append(labels)
    if "logits" in metric.needs:
        given += [student.logits, teacher.logits]
    function = losses.METRICS[metric.name].function
    return function(*given, **dict(metric.options), has_aux=True)


def exact_w2(x: np.ndarray, y: np.ndarray) -> float:
    """Compute W2^2 in float64, by the network simplex of POT."""
    import ot

    cost = ot.dist(x.astype(np.float64), y.astype(np.float64))
    return float(np.asarray(ot.emd2([], [], cost, numItermax=10_000_000)))


def _exact_jw2(student: Outputs, teacher: Outputs) -> float:
    """Compute JW2^2 with beta = 1 and the cross-entropy in float64, by SciPy's assignment."""
    from .transport import exact

    x, y = ([np.asarray(out.features), np.asarray(out.logits)] for out in (student, teacher))
    return exact(x, y, [np.arange(len(x[0]))])[0]


def textbook_gaussian_w2(x: np.ndarray, y: np.ndarray, ridge: float = 0.0) -> float:
    """Compute the Gaussian W2^2 in float64, by eigendecompositions of covariances."""
    del ridge
    x, y = x.astype(np.float64), y.astype(np.float64)
    means, cov_x, cov_y = _moments(x, y)
    values, vectors = np.linalg.eigh(cov_x)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_y @ root), 0)).sum()
    return float(means @ means + np.trace(cov_x) + np.trace(cov_y) - 2 * inner)


def diagonal_gaussian_w2(x: np.ndarray, y: np.ndarray, ridge: float = 0.0) -> float:
    """Compute the diagonal Gaussian W2^2 in float64, feature by feature."""
    del ridge
    return float(((x.mean(0) - y.mean(0)) ** 2 + (x.std(0) - y.std(0)) ** 2).sum())


def textbook_gaussian_kl(x: np.ndarray, y: np.ndarray, ridge: float) -> float:
    """Compute the Gaussian KL in float64, by both covariances' inverse and determinants."""
    gap, cov_x, cov_y = _moments(x, y)
    cov_x, cov_y = (cov + ridge * np.eye(len(cov)) for cov in (cov_x, cov_y))
    solved = np.linalg.solve(cov_y, np.column_stack([cov_x, gap]))
    log_dets = np.linalg.slogdet(cov_y)[1] - np.linalg.slogdet(cov_x)[1]
    return float(np.trace(solved[:, :-1]) + gap @ solved[:, -1] - len(gap) + log_dets) / 2


def _moments(x: np.ndarray, y: np.ndarray):
    cov_x, cov_y = (np.atleast_2d(np.cov(z.T, bias=True)) for z in (x, y))
    return x.mean(0) - y.mean(0), cov_x, cov_y


def features(x, y) -> tuple[Outputs, Outputs]:
    """Return two clouds as two networks' outputs, without logits."""
    x, y = map(jax.numpy.asarray, (x, y))
    return Outputs(x, x[:, :0]), Outputs(y, y[:, :0])
