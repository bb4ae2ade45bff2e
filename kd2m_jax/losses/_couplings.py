"""From a cost and two clouds to the value of the transport between them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd2m_jax.losses._assignment import assign
from kd2m_jax.losses._checks import choice, flag, number
from kd2m_jax.losses._costs import PairCost
from kd2m_jax.losses._groups import Groups
from kd2m_jax.losses._numerics import HIGHEST
from kd2m_jax.losses._rotation import NO_DIRECTION, isometry, turned
from kd2m_jax.losses._solvers import (
    AUTO_ON_CPU,
    COUPLINGS,
    SOLVERS,
    TransportInfo,
    dual_start,
    paired_plan,
    sinkhorn_plan,
    transport_plan,
    varying_alike,
)


def transport(
    make_cost: Callable[[Groups], PairCost],
    x: Any,
    y: Any,
    groups: Groups,
    solver: str,
    epsilon: float,
    debiased: bool,
    has_aux: bool,
) -> jax.Array | tuple[jax.Array, TransportInfo]:
    """Compute the chosen solver's or the divergence's value, with ``has_aux`` the info too."""
    if on_cpu := solver == AUTO_ON_CPU:
        solver = "auto"
    choice("solver", solver, SOLVERS)
    number("epsilon", epsilon)
    if flag("debiased", debiased) and solver not in ("auto", "sinkhorn"):
        raise ValueError(
            f"debiased=True takes away the bias of the entropy, and solver={solver!r} has none: "
            "use solver='sinkhorn'"
        )
    n, m = groups.size_s.size, groups.size_t.size
    if solver == "exact" and groups.apart is not None:
        raise ValueError(
            "solver='exact' pairs samples one to one, which labels_t does not allow: use "
            "solver='sinkhorn' or 'ipot'"
        )
    if solver == "exact" and n != m:
        raise ValueError(
            f"solver='exact' pairs samples one to one, so it needs m = n, got n = {n} and m = {m}: "
            "use solver='sinkhorn' or 'ipot'"
        )
    x, y, groups = varying_alike((x, y, groups))
    cost = make_cost(groups)
    if debiased:
        value, info = _divergence(make_cost, x, y, groups, epsilon)
    elif solver == "exact":
        value, info = _paired(cost, groups, x, y)
    elif solver == "auto" and n == m and groups.apart is None:
        value, info = _by_platform(cost, groups, epsilon, x, y, has_aux, on_cpu)
    else:
        name = "sinkhorn" if solver == "auto" else solver
        value, info = _coupled(cost, groups, COUPLINGS[name], epsilon, x, y)
    return value if info is None or not has_aux else (value, info)


def aligned(
    make_cost: Callable[[Groups], PairCost],
    z_s: jax.Array,
    z_t: jax.Array,
    groups: Groups,
    solver: str,
    epsilon: float,
    debiased: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return the clouds with the teacher's turned onto the student's, by the solver's coupling."""
    solver = "sinkhorn" if debiased else solver  # the divergence's coupling

    def coupled(x: jax.Array, y: jax.Array, start: jax.Array) -> jax.Array:
        # Samples that the start's directions do not tell apart: as in the unturned spaces.
        turn = isometry(start, NO_DIRECTION) + 1e-3 * jnp.eye(len(start))
        y = jnp.matmul(y, turn.astype(y.dtype), precision=HIGHEST)
        found: Any = transport(make_cost, x, y, groups, solver, epsilon, False, True)
        return jnp.matmul(found[1].coupling.T, x, precision=HIGHEST)

    return turned(z_s, z_t, groups, coupled)


def _paired(cost: PairCost, groups: Groups, x: Any, y: Any) -> tuple[jax.Array, TransportInfo]:
    """Compute the exact cost, and its gradient, from the n pairs of the best assignment: O(nd)."""
    left, right = jax.lax.stop_gradient(cost.factors(x, y))
    inner = jnp.matmul(-left, right.T, precision=HIGHEST)
    columns = assign(groups.within(inner, outside=jnp.inf)).columns

    def partner(a):  # without a gradient's sum over those that share an index: none do
        return a.at[columns].get(mode="promise_in_bounds", unique_indices=True)

    value = jnp.sum(groups.weight_s * cost.pairs(x, jax.tree.map(partner, y)))
    return value, paired_plan(columns, groups)


def _coupled(
    cost: PairCost, groups: Groups, solve: Callable, epsilon: float, x: Any, y: Any
) -> tuple[jax.Array, TransportInfo]:
    """``<stop_gradient(P), C>`` for the plan P of an iterative solver."""
    pair_costs = _nonnegative(cost.matrix(x, y))
    plan = solve(_fixed(pair_costs, groups), groups, epsilon)
    info = jax.lax.stop_gradient(plan)
    return jnp.sum(info.coupling * pair_costs), info


def _by_platform(
    cost: PairCost, groups: Groups, epsilon: float, x: Any, y: Any, has_aux: bool, on_cpu: bool
) -> tuple[jax.Array, TransportInfo | None]:
    """Exact on a CPU, Sinkhorn elsewhere, whatever the platform that the program is for.

    Each branch gives its gradient along with its value. Differentiating the choice itself would
    keep the n x n residuals of both branches. Where ``on_cpu`` is known Sinkhorn is not traced.
    """

    def with_gradient(solve):
        def branch(x, y):
            both = jax.value_and_grad(solve, argnums=(0, 1), has_aux=True)
            (value, info), gradient = both(x, y)
            return value, gradient, info if has_aux else None  # a plan is built only if asked for

        return branch

    paired = functools.partial(_paired, cost, groups)
    elsewhere = functools.partial(transport_plan, on_cpu=False)
    coupled = functools.partial(_coupled, cost, groups, elsewhere, epsilon)
    exact = with_gradient(paired)
    choose = functools.partial(
        jax.lax.platform_dependent, cpu=exact, default=with_gradient(coupled)
    )
    value, gradient, info = (exact if on_cpu else choose)(*jax.lax.stop_gradient((x, y)))
    return _differentiable(value, gradient, (x, y)), info


@jax.custom_jvp
def _differentiable(value: jax.Array, gradient: Any, at: Any) -> jax.Array:
    """Give a value this constant gradient with respect to ``at``."""
    del gradient, at
    return value


@_differentiable.defjvp
def _(primals, tangents):
    value, gradient, _ = primals
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), gradient, tangents[2])
    return value, functools.reduce(jnp.add, jax.tree.leaves(products))


@jax.custom_jvp
def _nonnegative(cost: jax.Array) -> jax.Array:
    """Without the rounding errors below zero, whose gradient stays: one array for all uses."""
    return jnp.maximum(cost, 0)


@_nonnegative.defjvp
def _(primals, tangents):
    return _nonnegative(*primals), tangents[0]


def _fixed(cost: jax.Array, groups: Groups) -> jax.Array:
    """Return what a solver sees: constant costs, infinite across groups."""
    return groups.within(jax.lax.stop_gradient(cost), outside=jnp.inf)


def _divergence(
    make_cost: Callable[[Groups], PairCost], x: Any, y: Any, groups: Groups, epsilon: float
) -> tuple[jax.Array, TransportInfo]:
    """``OT(x, y) - (OT(x, x) + OT(y, y)) / 2`` of entropic costs, one epsilon for all three.

    Its gradient is that of ``<P, C>`` in each term with P constant (envelope theorem), in the
    self terms through both arguments. The measure that the entropy is relative to adds
    constants, which cancel.
    """
    cost = _nonnegative(make_cost(groups).matrix(x, y))
    scale = dual_start(_fixed(cost, groups), groups, epsilon).scale
    terms = (
        (1.0, x, y, groups, scale),
        (-0.5, x, x, groups.of_students(), scale),
        (-0.5, y, y, groups.of_teachers(), groups.at_t(scale)),
    )
    value, infos = jnp.zeros((), scale.dtype), []
    for weight, p, q, members, scale in terms:
        cost = _nonnegative(make_cost(members).matrix(p, q))
        info, entropic = jax.lax.stop_gradient(
            sinkhorn_plan(_fixed(cost, members), members, epsilon, scale)
        )
        linear = jnp.sum(info.coupling * cost)
        value += weight * (entropic + (linear - jax.lax.stop_gradient(linear)))
        infos.append(info)
    converged = jnp.all(jnp.stack([info.converged for info in infos]))
    n_iters = jnp.sum(jnp.stack([info.n_iters for info in infos]))
    return value, TransportInfo(infos[0].coupling, converged, n_iters)
