"""What the number of classes costs, and the full-covariance Gaussian beside its textbook form."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kd2m_jax import losses
from kd2m_jax.internal import by_products, by_svd
from kd2m_jax.internal import tolerance as polar_tolerance

from . import measure
from .answers import GAUSSIAN_LIMIT, answer, features, textbook_gaussian_w2
from .answers import verdict as right_or_wrong


def classes(
    out: str,
    counts: Sequence[int] = (10, 100, 1000),
    n: int = 1024,
    d: int = 128,
    repeats: int = 15,
) -> tuple[list[dict], list[str]]:
    """Time one batch cut into few and into many classes; the ratio is to the fastest cut."""
    del out  # no plot
    rows, notes = [], []
    for name in ("cw2", "gaussian_cw2", "gaussian_ckl"):
        cases = []
        for count in counts:
            x, y, labels = measure.clouds("clustered", n, d, count)
            columns = {"metric": name, "n": n, "d": d, "classes": count}
            columns |= answer(name, *features(x, y), labels)
            run = measure.compiled(getattr(losses, name), *map(jnp.asarray, (x, y, labels)))
            cases.append(measure.Case(columns, run))
        rows += (timed := measure.ratios(measure.in_turn(cases, repeats), min))
        worst = max(row["ratio"] for row in timed)
        notes.append(measure.verdict(f"{name}: the slowest cut over the fastest", worst, 1.5))
    return rows, notes


def gaussian(
    out: str,
    shapes: Sequence[tuple[int, int]] = ((128, 512), (1024, 128)),
    polar_sizes: Sequence[int] = (128, 512),
    repeats: int = 15,
) -> tuple[list[dict], list[str]]:
    """Time `gaussian_w2` beside d x d eigendecompositions, n x n, and its polar factor two ways."""
    del out
    rows, notes = [], []
    for n, d in shapes:
        x, y, _ = measure.clouds("related", n, d)
        z_s, z_t, one = jnp.asarray(x), jnp.asarray(y), jnp.zeros(n, int)
        peers = [("gaussian_w2", losses.gaussian_w2), ("d x d, eigh twice", eigh_gaussian_w2)]
        if n > d:  # one class, which the masked form takes at n x n
            peers.append(("n x n, SVD", lambda s, t, one=one: losses.gaussian_cw2(s, t, one)))
        cases = []
        for what, function in peers:
            off = float(function(z_s, z_t)) / textbook_gaussian_w2(x, y) - 1
            columns = {"what": what, "n": n, "d": d, "off by": f"{100 * off:+.4f}%"}
            columns["answer"] = right_or_wrong(abs(off) <= GAUSSIAN_LIMIT)
            cases.append(measure.Case(columns, measure.compiled(function, z_s, z_t)))
        rows += (timed := measure.ratios(measure.in_turn(cases, repeats)))
        if n < d:
            title = f"n = {n}, d = {d}: the d x d eigendecompositions over gaussian_w2"
            notes.append(measure.verdict(title, timed[1]["ratio"], 10, least=True))
    for n in polar_sizes:
        rows += _polar(n, 512, repeats)
    return rows, notes


def eigh_gaussian_w2(z_s: jax.Array, z_t: jax.Array) -> jax.Array:
    """Compute the textbook form in JAX, with the trace term's derivative in closed form.

    With A = S^1/2 and centred rows X the derivative of ``Tr((A Q A)^1/2)`` is
    ``X A^-1 (A Q A)^-1/2 A Q / n``, inverses on the range. Differentiating through eigh instead
    gives NaN, because eigenvalues repeat when n <= d.
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
    """Raise a positive semi-definite matrix to several powers, on its range."""
    values, vectors = jnp.linalg.eigh(matrix)
    kept = values > 1e-6 * values[-1]
    values = jnp.where(kept, values, 1)
    scaled = [vectors * jnp.where(kept, values**power, 0)[None, :] for power in powers]
    return [jnp.matmul(vs, vectors.T, precision="highest") for vs in scaled]


def _polar(n: int, d: int, repeats: int) -> list[dict]:
    x, y, _ = measure.clouds("related", n, d)
    x, y = x - x.mean(0), y - y.mean(0)
    k = jnp.asarray(x @ y.T / np.linalg.norm(x) / np.linalg.norm(y))
    nuclear = np.linalg.svd(np.asarray(k, np.float64), compute_uv=False).sum()
    cases = []
    for what, factor in (
        ("SVD", by_svd),
        ("products", by_products),
    ):
        program = jax.jit(functools.partial(factor, tolerance=polar_tolerance(k)))
        left, right = program(k)
        off = float(jnp.sum(jnp.matmul(left, right.T, precision="highest") * k)) / nuclear - 1

        def run(program=program):
            jax.block_until_ready(program(k))

        columns = {"what": f"polar, {what}", "n": n, "d": d, "off by": f"{100 * off:+.4f}%"}
        columns["answer"] = right_or_wrong(abs(off) <= GAUSSIAN_LIMIT)
        cases.append(measure.Case(columns, run))
    return measure.ratios(measure.in_turn(cases, repeats))
