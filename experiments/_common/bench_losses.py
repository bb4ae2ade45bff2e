"""What the number of classes costs, and the full-covariance Gaussian beside its textbook form."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments._common import bench
from kd2m_jax import losses


def classes(
    out: str,
    counts: Sequence[int] = (10, 100, 1000),
    n: int = 1024,
    d: int = 128,
    repeats: int = 15,
) -> tuple[list[dict], list[str]]:
    """The same batch cut into few and into many classes; the ratio is to the fastest cut."""
    del out  # no plot
    rows, notes = [], []
    for name in ("cw2", "gaussian_cw2", "gaussian_ckl"):
        cases = []
        for count in counts:
            z_s, z_t, labels = map(jnp.asarray, bench.clouds("related", n, d, count))
            run = bench.compiled(getattr(losses, name), z_s, z_t, labels)
            cases.append(bench.Case({"metric": name, "n": n, "d": d, "classes": count}, run))
        rows += (timed := bench.ratios(bench.measure(cases, repeats), min))
        worst = max(row["ratio"] for row in timed)
        notes.append(f"{name}: the slowest takes {worst:.2f} times the fastest (target 1.5)")
    return rows, notes


def gaussian(
    out: str,
    shapes: Sequence[tuple[int, int]] = ((128, 512), (1024, 128)),
    polar_sizes: Sequence[int] = (128, 512),
    repeats: int = 15,
) -> tuple[list[dict], list[str]]:
    """`gaussian_w2` beside d x d eigendecompositions, n x n, and its polar factor two ways."""
    del out
    rows = []
    for n, d in shapes:
        x, y, _ = bench.clouds("related", n, d)
        z_s, z_t, one = jnp.asarray(x), jnp.asarray(y), jnp.zeros(n, int)
        peers = [("gaussian_w2", losses.gaussian_w2), ("d x d, eigh twice", eigh_gaussian_w2)]
        if n > d:  # one class, which the masked form takes at n x n
            peers.append(("n x n, SVD", lambda s, t, one=one: losses.gaussian_cw2(s, t, one)))
        cases = []
        for what, function in peers:
            off = float(function(z_s, z_t)) / textbook_gaussian_w2(x, y) - 1
            columns = {"what": what, "n": n, "d": d, "off by": f"{100 * off:+.4f}%"}
            cases.append(bench.Case(columns, bench.compiled(function, z_s, z_t)))
        rows += bench.ratios(bench.measure(cases, repeats))
    for n in polar_sizes:
        rows += _polar(n, 512, repeats)
    return rows, []


def textbook_gaussian_w2(x: np.ndarray, y: np.ndarray) -> float:
    """Float64, by eigendecompositions of covariances."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    cov_x, cov_y = (np.cov(z.T, bias=True) for z in (x, y))
    values, vectors = np.linalg.eigh(cov_x)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_y @ root), 0)).sum()
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(means + np.trace(cov_x) + np.trace(cov_y) - 2 * inner)


def eigh_gaussian_w2(z_s: jax.Array, z_t: jax.Array) -> jax.Array:
    """The textbook form in JAX, with the derivative of the trace term in closed form.

    With A = S^1/2 and centred rows X that of ``Tr((A Q A)^1/2)`` is
    ``X A^-1 (A Q A)^-1/2 A Q / n``, inverses on the range. Differentiating through
    eigh instead gives NaN, for eigenvalues repeat when n <= d.
    """
    means = jnp.sum((z_s.mean(0) - z_t.mean(0)) ** 2)
    x, y = z_s - z_s.mean(0, keepdims=True), z_t - z_t.mean(0, keepdims=True)
    cov_s, cov_t = (jnp.matmul(z.T, z, precision="highest") / len(z) for z in (x, y))
    fixed, q = jax.lax.stop_gradient((cov_s, cov_t))
    a, a_inverse = _powers(fixed, 0.5, -0.5)
    middle, inverse = _powers(_product(a, q, a), 0.5, -0.5)
    slope = jax.lax.stop_gradient(_product(x, a_inverse, inverse, a, q)) / len(x)
    linear = jnp.sum(slope * x)
    inner = jnp.trace(middle) + linear - jax.lax.stop_gradient(linear)
    return means + jnp.trace(cov_s) + jnp.trace(cov_t) - 2 * inner


def _product(*matrices: jax.Array) -> jax.Array:
    return jnp.linalg.multi_dot(list(matrices), precision="highest")


def _powers(matrix: jax.Array, *powers: float) -> list[jax.Array]:
    """Powers of a positive semi-definite matrix on its range."""
    values, vectors = jnp.linalg.eigh(matrix)
    kept = values > 1e-6 * values[-1]
    values = jnp.where(kept, values, 1)
    scaled = [vectors * jnp.where(kept, values**power, 0)[None, :] for power in powers]
    return [jnp.matmul(vs, vectors.T, precision="highest") for vs in scaled]


def newton_schulz(k: jax.Array, steps: int = 30) -> jax.Array:
    """The polar factor by matrix products alone: singular values s <- s (3 - s^2) / 2, to 1."""
    k = k / jnp.linalg.norm(k)

    def step(_, p):
        gram = jnp.matmul(p.T, p, precision="highest")
        return 1.5 * p - 0.5 * jnp.matmul(p, gram, precision="highest")

    return jax.lax.fori_loop(0, steps, step, k)


def svd_polar(k: jax.Array) -> jax.Array:
    """The polar factor by SVD, null directions included: only its time is of interest."""
    u, _, vt = jnp.linalg.svd(k, full_matrices=False)
    return jnp.matmul(u, vt, precision="highest")


def _polar(n: int, d: int, repeats: int) -> list[dict]:
    x, y, _ = bench.clouds("related", n, d)
    x, y = x - x.mean(0), y - y.mean(0)
    k = jnp.asarray(x @ y.T / n)
    nuclear = np.linalg.svd(np.asarray(k, np.float64), compute_uv=False).sum()
    cases = []
    for what, function in (("polar, SVD", svd_polar), ("polar, 30 Newton-Schulz", newton_schulz)):
        program = jax.jit(function)
        off = float(jnp.sum(program(k) * k)) / nuclear - 1

        def run(program=program):
            jax.block_until_ready(program(k))

        columns = {"what": what, "n": n, "d": d, "off by": f"{100 * off:+.4f}%"}
        cases.append(bench.Case(columns, run))
    return bench.ratios(bench.measure(cases, repeats))
