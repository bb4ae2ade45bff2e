"""`w2`, `cw2`, `jw2` beside torch + POT: CPU time, value and gradient, on easy and hard clouds.

Times are CPU seconds of this process, forward and backward; ``taskset -c 0`` in front of the
command keeps both sides on one core.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax, softmax

import kd2m_jax.losses as metrics

from . import measure
from .clouds import ORDINARY, TRAPS, clouds

# How many times POT's time ours should take less, by metric and n: for related clouds, for others.
TARGETS = {
    "w2": {128: (2.5, 2.5), 512: (3, 4), 2048: (3.5, 5)},
    "jw2": {128: (2, 2), 512: (3, 4), 2048: (3.5, 5)},
    "cw2": {128: (1.5, 1.5), 512: (1.5, 1.5), 1024: (1, 1)},
}
NO_TORCH = "torch is not installed: the peer is NumPy's costs, POT's plan and a written gradient."
# How far value and gradient may be off, and how much dearer a pairing may be: all relative.
RIGHT, AS_GOOD = 1e-5, 1e-6

Arrays = Sequence[np.ndarray]  # features alone, or features and logits


# --- The right answer, and the peer -------------------------------------------------------------


def cost_matrix(x: Arrays, y: Arrays) -> np.ndarray:
    """Compute what the peer does too: squared distances by one product, and the cross-entropy."""
    cost = (x[0] ** 2).sum(1)[:, None] + (y[0] ** 2).sum(1)[None, :] - 2 * x[0] @ y[0].T
    if len(x) > 1:
        cost = cost - log_softmax(x[1], axis=1) @ softmax(y[1], axis=1).T
    return cost


def gradients(plan: np.ndarray, x: Arrays, y: Arrays) -> list[np.ndarray]:
    """Differentiate ``<P, C>`` with respect to the student's arrays, P constant."""
    weight = plan.sum(1)[:, None]
    found = [2 * (weight * x[0] - plan @ y[0])]
    if len(x) > 1:
        found.append(weight * softmax(x[1], axis=1) - plan @ softmax(y[1], axis=1))
    return found


def by_pairs(x: Arrays, y: Arrays, columns: np.ndarray) -> np.ndarray:
    """Compute the cost of each pair, by differences."""
    cost = ((x[0] - y[0][columns]) ** 2).sum(1)
    if len(x) > 1:
        cost = cost - (log_softmax(x[1], axis=1) * softmax(y[1], axis=1)[columns]).sum(1)
    return cost


def exact(x: Arrays, y: Arrays, parts: list[np.ndarray]):
    """Compute value, the student's gradients and the weights of rows, in float64, by parts."""
    x, y = ([a.astype(np.float64) for a in arrays] for arrays in (x, y))
    value, found, weight = 0.0, [0 * a for a in x], np.zeros(len(x[0]))
    for part in parts:
        s, t = ([a[part] for a in arrays] for arrays in (x, y))
        # Without what they have in common, which hides the differences of a collapsed cloud.
        near = [s[0] - s[0].mean(0), *s[1:]], [t[0] - t[0].mean(0), *t[1:]]
        _, columns = linear_sum_assignment(cost_matrix(*near))
        share = 1 / (len(parts) * len(part))
        value += by_pairs(s, t, columns).mean() / len(parts)
        weight[part] = share
        for whole, gradient in zip(found, gradients(share * np.eye(len(part))[columns], s, t),
                                   strict=True):  # fmt: skip
            whole[part] = gradient
    return value, found, weight


def of_pairs(x: Arrays, y: Arrays, columns: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """Differentiate the weighted cost of these pairs with respect to the student's arrays."""
    found = [2 * weight[:, None] * (x[0] - y[0][columns])]
    if len(x) > 1:
        found.append(weight[:, None] * (softmax(x[1], axis=1) - softmax(y[1], axis=1)[columns]))
    return found


def numpy_pot(x: Arrays, y: Arrays, parts: list[np.ndarray]) -> Callable:
    """Make the peer without torch: NumPy's costs, POT's plan, the gradient as a formula."""
    import ot

    def run():
        value, found = 0.0, [0 * a for a in x]
        for part in parts:
            s, t = ([a[part] for a in arrays] for arrays in (x, y))
            cost = cost_matrix(s, t)
            plan = np.asarray(ot.emd([], [], cost, numItermax=10_000_000)) / len(parts)
            value += (plan * cost).sum()
            for whole, gradient in zip(found, gradients(plan, s, t), strict=True):
                whole[part] = gradient
        return value, found

    return run


def torch_pot(x: Arrays, y: Arrays, parts: list[np.ndarray]) -> Callable:
    """Make the paper's way: torch's costs (by one product), POT's plan, torch's gradient."""
    import ot
    import torch  # pyright: ignore[reportMissingImports]

    xs, ys = [torch.tensor(a, requires_grad=True) for a in x], [torch.tensor(a) for a in y]
    parts = [torch.tensor(part) for part in parts]

    def run():
        value = torch.zeros(())
        for a in xs:
            a.grad = None
        for part in parts:
            s, t = ([a[part] for a in arrays] for arrays in (xs, ys))
            norms = (s[0] ** 2).sum(1)[:, None] + (t[0] ** 2).sum(1)[None, :]
            cost = norms - 2 * s[0] @ t[0].T
            if len(s) > 1:
                cost = cost - torch.log_softmax(s[1], 1) @ torch.softmax(t[1], 1).T
            plan = ot.emd([], [], cost.detach().numpy(), numItermax=10_000_000)
            value = value + (torch.as_tensor(plan, dtype=cost.dtype) * cost).sum() / len(parts)
        value.backward()
        return value.item(), [np.asarray(a.grad) for a in xs]

    return run


# --- Measuring ----------------------------------------------------------------------------------


def relative(found, expected) -> float:
    """Compute how far some arrays are off, as a whole."""
    pairs = [(np.asarray(f, float), np.asarray(e, float))
             for f, e in zip(found, expected, strict=True)]  # fmt: skip
    off = sum(((f - e) ** 2).sum() for f, e in pairs)
    size = sum((e**2).sum() for _, e in pairs)
    return float(np.sqrt(off / size)) if size else float(np.sqrt(off))


def case(name: str, columns: dict, x: Arrays, y: Arrays, labels, solver: str, repeats: int) -> dict:
    """Return one row: ours and the peer's time, and how far value, gradient and pairing are off.

    The gradient is compared with that of our own pairing in float64, because where two pairings are
    as good (ties) their gradients differ and both are right. "pairing off" is how much dearer ours
    is than SciPy's, in float64; "ties" how far apart their gradients lie.
    """
    parts = [np.arange(len(x[0]))]
    if labels is not None:
        parts = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    given: list[Any] = [x[0], y[0], *x[1:], *y[1:]] + ([] if labels is None else [labels])
    arrays = [jnp.asarray(a) for a in given]
    loss = functools.partial(getattr(metrics, name), solver=solver)
    student = (0,) if len(x) == 1 else (0, 2)
    both = jax.jit(jax.value_and_grad(loss, argnums=student)).lower(*arrays).compile()
    peer = (torch_pot if measure.has_torch() else numpy_pot)(x, y, parts)
    cases = [measure.Case({}, lambda: jax.block_until_ready(both(*arrays))), measure.Case({}, peer)]
    mine, theirs = measure.in_turn(cases, repeats, 2.0, time.process_time)
    value, gradient, weight = exact(x, y, parts)
    ours, found = both(*arrays)
    columns_of = np.asarray(loss(*arrays, has_aux=True)[1].coupling).argmax(axis=1)
    s, t = ([a.astype(np.float64) for a in cloud] for cloud in (x, y))
    pairing = (weight * by_pairs(s, t, columns_of)).sum() - value
    own = of_pairs(s, t, columns_of, weight)
    their_value, their_gradient = peer()
    size = abs(value) or 1.0
    return {"metric": name, **columns} | {
        "ms": mine["ms"],
        "POT, ms": theirs["ms"],
        "times": theirs["ms"] / mine["ms"],
        "value off": abs(float(ours) - value) / size,
        "gradient off": relative(found, own),
        "pairing off": pairing / size,
        "ties": relative(own, gradient),
        "POT's value off": abs(float(their_value) - value) / size,
        "POT's gradient off": relative(their_gradient, gradient),
    }


def losses(
    out: str,
    sizes: Sequence[int] = (128, 512, 2048),
    d: int = 512,
    repeats: int = 30,
    solver: str = "auto",
    kinds: Sequence[str] = ORDINARY,
    traps: Sequence[str] = TRAPS,
    classes: Sequence[int] = (10, 100),
) -> tuple[list[dict], list[str]]:
    """Return rows and notes: four kinds of clouds for each metric, the traps for `w2`."""
    del out  # no plot
    rows = []
    measured = functools.partial(case, solver=solver, repeats=repeats)

    def drawn(kind, n, *options):
        x, y, labels = clouds(kind, n, *options)
        return x.astype(np.float32), y.astype(np.float32), labels

    for n in sizes:
        for kind in kinds:
            x, y, _ = drawn(kind, n, d)
            rows.append(measured("w2", {"clouds": kind, "n": n}, [x], [y], None))
            head = np.random.default_rng(1).normal(size=(d, 10)) / d**0.5
            h_s, h_t = ((z @ head).astype(np.float32) for z in (x, y))
            rows.append(measured("jw2", {"clouds": kind, "n": n}, [x, h_s], [y, h_t], None))
        for kind in traps if n >= 512 or n == min(sizes) else ():
            x, y, _ = drawn(kind, n)
            rows.append(measured("w2", {"clouds": kind, "n": n}, [x], [y], None))
    for n in dict.fromkeys(min(n, 1024) for n in sizes):
        for kind in kinds:
            for count in classes:
                x, y, labels = drawn(kind, n, d, count)
                columns = {"clouds": kind, "n": n, "classes": count}
                rows.append(measured("cw2", columns, [x], [y], labels))
    return rows, [*([] if measure.has_torch() else [NO_TORCH]), *verdicts(rows)]


def verdicts(rows: list[dict]) -> list[str]:
    """Write notes: speed against the targets, and answers that are wrong."""
    notes = []
    for row in rows:
        keys = ("metric", "clouds", "n", "classes")
        place = ", ".join(str(row[key]) for key in keys if key in row)
        bound = TARGETS[row["metric"]].get(row["n"])
        if row["clouds"] in TRAPS:
            least = 0.5 if row["clouds"] == "one-hot both" else 1
            bound = (least, least) if row["n"] >= 512 else None
        if bound is not None and row.get("classes", 10) == 10:
            target = bound[row["clouds"] != "related"]
            title = f"{place}: POT's time over ours"
            notes.append(measure.verdict(title, row["times"], target, least=True))
        if not is_right(row):
            notes.append(f"{place}: value or gradient is off by more than {RIGHT:g}: MISSED")
    few = {(r["clouds"], r["n"]): r["ms"] for r in rows if r.get("classes") == 10}
    for row in rows:
        if row.get("classes") == 100:
            ratio = row["ms"] / few[row["clouds"], row["n"]]
            place = f"cw2, {row['clouds']}, {row['n']}: time with 100 classes over that with 10"
            notes.append(measure.verdict(place, ratio, 1.3))
    return notes


def is_right(row: dict) -> bool:
    """Tell whether the pairing is as good as the best one, and value and gradient are its own."""
    exact = max(row["value off"], row["gradient off"]) <= RIGHT
    return exact and abs(row["pairing off"]) <= AS_GOOD
