"""`w2` and `cw2` beside what a user would run instead, with their errors beside their times."""

import functools
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._common import bench
from kd2m_jax import losses

NO_TORCH = "torch is not installed, so its rows are left out: pip install --group bench adds it."
LIMIT = 0.01
# The padded peer takes K n x n matrices: seconds a call beyond these.
PADDED_ENTRIES = 3_000_000


def peers(
    out: str,
    sizes: Sequence[int] = (128, 512, 2048),
    d: int = 512,
    classes: Sequence[int] = (10, 100),
    repeats: int = 30,
    kinds: Sequence[str] = bench.KINDS,
) -> tuple[list[dict], list[str]]:
    """Rows and notes, and peers.png in the folder ``out``."""
    rows, notes = [], []
    if not _torch():
        notes.append(NO_TORCH)
    for n in sizes:
        for kind in kinds:
            x, y, _ = bench.clouds(kind, n, d)
            exact = exact_w2(x, y)
            cases = [
                bench.Case({"clouds": kind, "n": n, "what": what, **judge(plan, value, exact)}, run)
                for what, run, value, plan in marginal(x, y)
            ]
            rows += bench.ratios(bench.measure(cases, repeats))
    _plot(rows, pathlib.Path(out) / "peers.png")
    for n in sizes:
        for k in classes if n < 2048 else ():
            x, y, labels = bench.clouds("related", n, d, k)
            parts = [labels == c for c in np.unique(labels)]
            exact = sum(exact_w2(x[p], y[p]) for p in parts) / len(parts)
            weight = 1 / (len(parts) * np.bincount(labels)[labels])
            name = {"clouds": f"related, {k} classes", "n": n}
            cases = [
                bench.Case({**name, "what": what, **judge(plan, value, exact, weight)}, run)
                for what, run, value, plan in conditional(x, y, labels)
            ]
            rows += bench.ratios(bench.measure(cases, repeats))
    return rows, notes


def judge(plan, value, exact: float, weight=None) -> dict:
    """The columns that say whether an answer is right: cost and marginals of its plan."""
    if plan is None:
        return {}
    plan = np.asarray(plan, np.float64)
    rows = np.full(plan.shape[0], 1 / plan.shape[0]) if weight is None else weight
    columns = np.full(plan.shape[1], 1 / plan.shape[1]) if weight is None else weight
    off = float(value) / exact - 1
    error = np.abs(plan.sum(1) - rows).sum() + np.abs(plan.sum(0) - columns).sum()
    right = abs(off) <= LIMIT and error <= LIMIT
    return {
        "cost": f"{100 * off:+.2f}%",
        "marginals": float(error),
        "answer": "right" if right else "WRONG",
    }


def exact_w2(x: np.ndarray, y: np.ndarray) -> float:
    """W2^2 in float64, by the network simplex of POT."""
    import ot

    cost = ot.dist(x.astype(np.float64), y.astype(np.float64))
    return float(ot.emd2([], [], cost, numItermax=10_000_000))


Answer = tuple[str, Callable[[], object], Any, Any]


def marginal(x: np.ndarray, y: np.ndarray) -> list[Answer]:
    """Ours, its peers and the floor: name, what to time, value and plan."""
    z_s, z_t = jnp.asarray(x), jnp.asarray(y)
    found: list[Answer] = [("w2", *ours(losses.w2, z_s, z_t))]
    if _torch():
        for cost in ("cdist", "product"):
            found.append((f"torch + emd, {cost}", *torch_emd([(x, y)], cost)))
    plain, out = plain_ott(z_s, z_t)
    found.append(("ott-jax, defaults", plain, out.primal_cost, out.matrix))
    return [*found, ("floor: two products", two_products(z_s, z_t), None, None)]


def conditional(x: np.ndarray, y: np.ndarray, labels: np.ndarray) -> list[Answer]:
    """The same for `cw2`, whose peers go through the classes one by one or pad them."""
    z_s, z_t, y_s = jnp.asarray(x), jnp.asarray(y), jnp.asarray(labels)
    found: list[Answer] = [("cw2", *ours(losses.cw2, z_s, z_t, y_s))]
    if _torch():
        parts = [labels == c for c in np.unique(labels)]
        run, value, plans = torch_emd([(x[p], y[p]) for p in parts], "cdist")
        plan = np.zeros((len(x), len(x)))
        for p, part_plan in zip(parts, plans, strict=True):
            plan[np.ix_(p, p)] = part_plan / len(parts)
        found.append(("torch + emd, loop over classes", run, value, plan))
    count = int(labels.max()) + 1
    if count * len(x) ** 2 <= PADDED_ENTRIES:
        run, value, plan = padded_classes(z_s, z_t, y_s, count)
        found.append(("ott-jax, padded classes", run, value, plan))
    return found


def ours(function: Callable, *arrays: jax.Array):
    """What to time, value and plan of one of our losses, all of one program."""
    both = jax.jit(jax.value_and_grad(functools.partial(function, has_aux=True), has_aux=True))
    (value, info), _ = both(*arrays)
    return lambda: jax.block_until_ready(both(*arrays)), value, info.coupling


def two_products(z_s: jax.Array, z_t: jax.Array) -> Callable[[], object]:
    """The floor: inner products for the cost, and a plan times features for the gradient."""

    @jax.jit
    def products(z_s, z_t):
        inner = jnp.matmul(z_s, z_t.T, precision="highest")
        return inner, jnp.matmul(inner, z_t, precision="highest")

    return lambda: jax.block_until_ready(products(z_s, z_t))


def plain_ott(z_s: jax.Array, z_t: jax.Array):
    """ott-jax as its documentation has it: regularised cost, default epsilon and solver."""
    from ott.geometry import pointcloud
    from ott.solvers import linear

    def solve(z_s, z_t):
        return linear.solve(pointcloud.PointCloud(z_s, z_t))

    with jax.numpy_rank_promotion("allow"):  # ott-jax relies on it
        run = bench.compiled(lambda z_s, z_t: solve(z_s, z_t).reg_ot_cost, z_s, z_t)
        out = jax.jit(solve)(z_s, z_t)
        return run, out


def padded_classes(z_s: jax.Array, z_t: jax.Array, labels: jax.Array, count: int):
    """Vmap over classes; a class may fill the batch, so each is padded to it."""
    from ott.geometry import geometry
    from ott.solvers import linear

    def one(cost, member):
        weight = member / member.sum()
        plan = linear.solve(geometry.Geometry(jax.lax.stop_gradient(cost)), weight, weight).matrix
        return jnp.sum(plan * cost), plan

    def mean(z_s, z_t):
        inner = jnp.matmul(z_s, z_t.T, precision="highest")
        cost = jnp.sum(z_s**2, 1)[:, None] + jnp.sum(z_t**2, 1)[None, :] - 2 * inner
        members = (labels[None, :] == jnp.arange(count)[:, None]).astype(cost.dtype)
        values, plans = jax.vmap(one, in_axes=(None, 0))(cost, members)
        return values.mean(), plans.mean(0)

    with jax.numpy_rank_promotion("allow"):  # ott-jax relies on it
        both = jax.jit(jax.value_and_grad(mean, has_aux=True)).lower(z_s, z_t).compile()
    (value, plan), _ = both(z_s, z_t)
    return lambda: jax.block_until_ready(both(z_s, z_t)), value, plan


def torch_emd(pairs: Sequence[tuple[np.ndarray, np.ndarray]], cost: str):
    """What the paper's code does: torch's costs, POT's emd, torch's gradient; mean over pairs."""
    import ot
    import torch  # pyright: ignore[reportMissingImports]

    tensors = [(torch.tensor(x, requires_grad=True), torch.tensor(y)) for x, y in pairs]

    def run():
        value, plans = torch.zeros(()), []
        for x, y in tensors:
            x.grad = None
            if cost == "cdist":
                costs = torch.cdist(x, y) ** 2
            else:
                costs = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * x @ y.T
            plan = ot.emd([], [], costs.detach().numpy(), numItermax=1_000_000)
            plans.append(plan)
            value = value + (torch.as_tensor(plan, dtype=costs.dtype) * costs).sum()
        value = value / len(tensors)
        value.backward()
        return value, plans

    value, plans = run()
    return run, value.item(), plans if len(plans) > 1 else plans[0]


def _torch() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def _plot(rows: list[dict], path: pathlib.Path) -> None:
    panels: dict = {}
    for row in rows:
        lines = panels.setdefault(f"{row['clouds']} clouds", {})
        lines.setdefault(row["what"], []).append(
            (row["n"], row["ms"], row.get("answer") != "WRONG")
        )
    label = "samples n (hollow: a wrong answer)"
    bench.log_log(panels, path, label, "forward + backward, ms", share=True)
