"""Solvers of one problem, ``min_P <P, C>`` over couplings P of two weighted clouds.

Costs are non-negative, infinite where two samples may not be matched (`Groups.within`). The
gradient never passes through a solver: callers detach the costs they hand in.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from kd2m_jax.losses._assignment import assign
from kd2m_jax.losses._checks import varies
from kd2m_jax.losses._groups import Groups

# How far the columns of Sinkhorn's plan may be off, in total.
TOLERANCE = 5e-4


class TransportInfo(NamedTuple):
    """What the solver found, for ``has_aux=True``.

    Attributes:
      coupling: ``[n, m]``, the plan P; non-negative, sums to one.
      converged: bool scalar; True for the exact solver.
      n_iters: int scalar, Sinkhorn and proximal iterations; 0 for the exact solver.

    Example:
      >>> import jax.numpy as jnp
      >>> from kd2m_jax import losses
      >>> z = jnp.array([[0.0], [4.0]])
      >>> value, info = losses.w2(z, z[::-1], solver="exact", has_aux=True)
      >>> print(info.coupling)  # row 0 of the student goes to row 1 of the teacher
      [[0.  0.5]
       [0.5 0. ]]
    """

    coupling: jax.Array
    converged: jax.Array
    n_iters: jax.Array


class Dual(NamedTuple):
    """A feasible dual solution (``f_i + g_j <= C_ij``) and the scale of the problem.

    Attributes:
      f, g: ``[n]``, ``[m]``.
      scale: ``[n]`` or ``[1]``, > 0, what epsilon is relative to in the group of each sample.
    """

    f: jax.Array
    g: jax.Array
    scale: jax.Array


def varying_alike(arrays):
    """Make all arrays vary over a shard_map's devices if one of them does.

    A loop's state may not begin the same on all devices and end different, and the branches of a
    choice may not differ in that: with its default checks shard_map raises.
    """
    leaves = jax.tree.leaves(arrays)
    if not any(map(varies, map(jnp.asarray, leaves))):
        return arrays
    never = functools.reduce(
        jnp.logical_or, [jnp.full_like(a, False, bool, shape=()) for a in leaves]
    )
    return jax.tree.map(lambda a: jnp.where(never, a, a), arrays)


def exact_plan(cost: jax.Array, groups: Groups) -> TransportInfo:
    """Return the plan of least cost, for n = m: a pairing. Groups do not interact within it."""
    return paired_plan(assign(cost).columns, groups)


def paired_plan(columns: jax.Array, groups: Groups) -> TransportInfo:
    """Return the plan that sends row i to ``columns[i]``, with row i's weight."""
    weight = groups.weight_s
    coupling = jnp.zeros_like(weight, shape=(columns.size, columns.size))
    coupling = coupling.at[jnp.arange(columns.size), columns].set(weight, unique_indices=True)
    # "like" the pairing, for shard_map: constants are the same on all devices, and it may not be.
    return TransportInfo(coupling, columns[0] >= 0, jnp.zeros_like(columns[0]))


def dual_start(cost: jax.Array, groups: Groups, epsilon: float) -> Dual:
    """Return the better of two dual solutions, each a minimum over rows and columns.

    Weak duality puts its value below the optimal cost, whatever the clouds look like: a scale
    for epsilon that the mean cost is not, which may be 500 times the optimum.
    """
    a, b = groups.mass_s, groups.mass_t
    rows = jnp.min(cost, axis=1)
    columns = jnp.min(cost, axis=0)
    duals = (
        (rows, jnp.min(cost - rows[:, None], axis=0)),
        (jnp.min(cost - columns[None, :], axis=1), columns),
    )
    # Groups do not interact, so each has its own scale: a tight class would be blurred by the
    # others'. Their weights 1/K leave the mean cost within a group.
    weight = groups.total_s(a)
    bounds = [(groups.total_s(a * f) + groups.total_t_at_s(b * g)) / weight for f, g in duals]
    first = bounds[0] > bounds[1]
    first_t = first if groups.apart is None else groups.at_t(first.astype(a.dtype)) > 0.5
    f, g = (jnp.where(better, x, y) for better, x, y in zip((first, first_t), *duals, strict=True))
    pairs = groups.within(a[:, None] * b[None, :])
    # Of fourth roots: of the costs themselves one sample far out takes all of the mean.
    roots = jnp.sum(jnp.where(pairs > 0, pairs * jnp.sqrt(jnp.sqrt(cost)), 0), axis=1)
    typical = (groups.total_s(roots) / weight**2) ** 4
    # Identical clouds bound the cost by zero, and identical points make even all costs zero.
    scale = jnp.maximum(jnp.maximum(*bounds), 1e-3 * typical)
    return Dual(f, g, jnp.maximum(scale, jnp.finfo(cost.dtype).tiny / min(epsilon, 1)))


def sinkhorn_plan(
    cost: jax.Array,
    groups: Groups,
    epsilon: float,
    scale: jax.Array | None = None,
    max_iterations: int = 2000,
    give_up: bool = False,
) -> tuple[TransportInfo, jax.Array]:
    """Compute the entropic plan, by ott-jax in the log domain, and its entropic cost.

    The cost is that of ``<P, C> + epsilon scale sum_ij P_ij log P_ij``, ``scale`` that of
    `dual_start` unless given. With ``give_up`` it ends where it would not converge in time.

    Measured on Gaussian, clustered, power-law and nearly matched clouds, marginal and by class (n
    128 and 512, d 16 to 512): epsilon at 1% of the *mean* cost is 0% to 90% above exact, because
    the mean may be 500 times the optimum; at 1% of the dual bound below it is 0% to 0.8% above, in
    10 to 400 iterations. Over-relaxation by 1.5 from zero potentials overflows when a sample lies
    far out; from the dual solution, with epsilon annealed, it does not.
    Where clusters differ in mass some of it has to go far, epsilon is small for that, and the
    value is still 5% to 73% too low after 2,000 iterations (n 64 to 512): see `transport_plan`.
    """
    # ott-jax takes seconds to import, and brings flax and matplotlib where they are installed:
    # not before it is used. That is while tracing, when a module's constants become tracers.
    with jax.ensure_compile_time_eval():
        from ott.geometry import epsilon_scheduler, geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import acceleration, sinkhorn

    a, b = groups.mass_s, groups.mass_t
    dual = dual_start(cost, groups, epsilon)
    scale = dual.scale if scale is None else scale
    if groups.same is None:  # one epsilon for all, and no second array of costs
        strength, scale = epsilon * scale[0], jnp.ones_like(scale)
    else:
        strength, cost = epsilon, cost / scale[:, None]
    schedule = epsilon_scheduler.Epsilon(target=strength, init=10.0, decay=0.8)
    solver = sinkhorn.Sinkhorn(
        threshold=TOLERANCE,
        inner_iterations=5,
        max_iterations=max_iterations,
        momentum=acceleration.Momentum(value=1.5),
        implicit_diff=None,
    )
    problem = linear_problem.LinearProblem(geometry.Geometry(cost, epsilon=schedule), a, b)

    def iterate(f, g):
        with jax.numpy_rank_promotion("allow"):  # ott-jax relies on it, whatever the caller set
            state = _iterated(solver, problem, (f, g), give_up)
            out = solver.output_from_state(problem, state)
        # It takes a loop that ended early for one that converged.
        small = state.errors[out.n_iters // solver.inner_iterations - 1, 0] <= TOLERANCE
        return out.g, out.converged & small, jnp.asarray(out.n_iters, jnp.int32)

    def keep(_, g):
        return g, jnp.array(True), jnp.zeros((), jnp.int32)

    # Where a student is close to its teacher the dual solution is optimal: 20 iterations saved.
    scale_t = groups.at_t(scale)
    f, g = dual.f / scale, dual.g / scale_t
    plan = a[:, None] * jax.nn.softmax((g[None, :] - cost) / strength, axis=1)
    error = jnp.sum(jnp.abs(jnp.sum(plan, axis=0) - b))

    def alike(function):  # for shard_map, as below
        return lambda f, g: varying_alike((*function(f, g), f[0]))[:3]

    g, converged, n_iters = jax.lax.cond(error <= TOLERANCE, alike(keep), alike(iterate), f, g)
    # One last plain update of the rows: over-relaxation leaves the total mass slightly off one.
    kernel = (g[None, :] - cost) / strength
    coupling = groups.weight_s[:, None] * jax.nn.softmax(kernel, axis=1)
    f = strength * (jnp.log(a) - logsumexp(kernel, axis=1))
    # With the mass at one, f and g are feasible duals: their value is second order in their error.
    entropic = jnp.sum(scale * groups.weight_s * f) + jnp.sum(scale_t * groups.weight_t * g)
    return TransportInfo(coupling, converged, n_iters), entropic


# Iterations until epsilon has come down to where it stays, and errors can be compared.
ANNEALED = 15


def _iterated(solver, problem, potentials, give_up):
    """Run ott-jax's Sinkhorn loop from a state that varies over devices as its results do."""
    from ott.math import fixed_point_loop

    def unfinished(iteration, constants, state):
        on = solver._continue(state, iteration)
        return on & ~hopeless(state.errors[:, 0], iteration) if give_up else on

    def hopeless(errors, iteration):
        checks = iteration // solver.inner_iterations
        last, before = errors[checks - 1], errors[checks - 2]
        forecast = last * (last / before) ** (len(errors) - checks)
        return (iteration >= ANNEALED + solver.inner_iterations) & (forecast > TOLERANCE)

    def error_of(state):
        return state.solution_error(
            problem,
            solver.norm_error,
            lse_mode=solver.lse_mode,
            parallel_dual_updates=solver.parallel_dual_updates,
            recenter=solver.recenter_potentials,
        )[0]

    def not_computed(state):
        return varying_alike((jnp.full_like(state.errors[0, 0], jnp.inf), state.errors))[0]

    def update(iteration, constants, state, compute_error):
        state = solver.lse_step(problem, state, iteration)
        error = jax.lax.cond(compute_error, error_of, not_computed, state)
        position = iteration // solver.inner_iterations
        return state.set(errors=state.errors.at[position, :].set(error))

    state = solver.init_state(problem, potentials)
    state, _ = varying_alike((state, problem.geom.cost_matrix[0, 0]))
    return fixed_point_loop.fixpoint_iter(
        unfinished,
        update,
        solver.min_iterations,
        solver.max_iterations,
        solver.inner_iterations,
        None,
        state,
    )


def ipot_plan(cost: jax.Array, groups: Groups, epsilon: float) -> TransportInfo:
    """Compute the unregularised plan, by the inexact proximal point method in the log domain.

    ``P <- argmin_Q <Q, C> + step KL(Q || P)``: the Gibbs kernel ``exp(-C / step)`` is multiplied
    into the plan, then Sinkhorn updates bring the marginals back. The entropy of a step only
    holds it near the previous plan, so no bias is left. Steps shrink by 10% each, from the mean
    cost to 10 epsilon of the best lower bound found so far: there the plan is as sharp as that
    of Sinkhorn with this epsilon, and goes on from it.

    The scalings, carried from step to step as in Xie et al., are a dual solution once a minimum
    over rows makes them feasible, so the gap between ``<P, C>`` and the dual value certifies the
    plan: the iteration ends with a gap below 0.1% and row sums off by less than 5e-4 in total.
    Measured as in `sinkhorn_plan`: within 0.1% of exact in 1 to 130 iterations, and in 110 to
    1,430 where clusters differ in mass.
    """
    a, b = groups.mass_s, groups.mass_t
    log_a, log_b = jnp.log(a), jnp.log(b)
    dual = dual_start(cost, groups, epsilon)
    # Reduced costs, zero where a pair is best: what is multiplied into the plan again and again
    # stays small where the mass is, and float32 keeps its digits.
    cost = (cost - dual.f[:, None] - dual.g[None, :]) / dual.scale[:, None]
    offset = jnp.sum(a * dual.f / dual.scale) + jnp.sum(b * dual.g / groups.at_t(dual.scale))

    def unfinished(state):
        _, _, _, error, gap, _, n_iters = state
        # On NaN both comparisons are false, and the iteration ends.
        return (n_iters < 5000) & ((error > 5e-4) | (gap > 1e-3))

    def update(state):
        log_plan, g, step, error, _, bound, n_iters = state
        # A step is taken when the last one's marginals are nearly right: with a kernel sharper
        # than the potentials deserve, Sinkhorn needs thousands of updates to correct them.
        advance = ~(error > 3e-3)
        step = jnp.where(advance, jnp.maximum(0.9 * step, 10 * epsilon * bound), step)
        log_plan = log_plan + jnp.where(advance, (g[None, :] - cost) / step, 0)
        log_plan += (log_a - logsumexp(log_plan, axis=1))[:, None]
        log_v = log_b - logsumexp(log_plan, axis=0)
        log_plan += log_v[None, :]
        plan, g = jnp.exp(log_plan), g + step * log_v
        error = jnp.sum(jnp.abs(jnp.sum(plan, axis=1) - a))
        f = jnp.min(cost - g[None, :], axis=1)
        dual_value = offset + jnp.sum(a * f) + jnp.sum(b * g)
        bound = jnp.maximum(bound, dual_value)
        gap = jnp.abs(offset + jnp.sum(groups.within(plan * cost)) - dual_value) / bound
        return log_plan, g, step, error, gap, bound, n_iters + 1

    log_plan = log_a[:, None] + log_b[None, :]
    pairs = groups.within(jnp.exp(log_plan))
    mean = jnp.sum(jnp.where(pairs > 0, pairs * cost, 0)) / jnp.sum(pairs)
    zero = jnp.zeros((), cost.dtype)
    # The scale may be far above the optimum, for 0.1% of the mean cost is its floor: this bound
    # may fall a thousand times below it, to where float32's digits of the mean cost end.
    bound = jnp.maximum(offset, 1e-3)
    step, count = jnp.maximum(mean, bound), jnp.zeros((), jnp.int32)
    state = (log_plan, 0 * b, step, zero, zero + jnp.inf, bound, count)
    state = varying_alike(state)
    log_plan, _, _, error, gap, _, n_iters = jax.lax.while_loop(unfinished, update, state)
    coupling = groups.weight_s[:, None] * jax.nn.softmax(log_plan, axis=1)
    return TransportInfo(coupling, (error <= 5e-4) & (gap <= 1e-3), n_iters)


def transport_plan(
    cost: jax.Array, groups: Groups, epsilon: float, *, on_cpu: bool = True
) -> TransportInfo:
    """Compute the entropic plan, or where that is slow to come an unregularised one.

    Either is within 1% of exact. For clouds whose clusters hold the same mass Sinkhorn takes 10 to
    400 iterations, mostly up to 75. Where 2% to 30% of a cluster's samples have to go to another
    one, 2,000 are not enough, from any start and with any annealing that was tried: the error
    stays where it is, and with epsilon up to 0.02 that shows after 20. Then the exact plan takes
    over on a CPU, if there are as many samples on both sides (4 ms at n = 512), else the proximal
    point method (130 to 410 iterations at n 128 and 512, d 512). Not ``on_cpu``, that one alone.
    """
    # With more entropy it converges, but not as steadily: a forecast would be wrong there.
    give_up = epsilon <= 0.02
    entropic, _ = sinkhorn_plan(cost, groups, epsilon, max_iterations=500, give_up=give_up)

    def proximal(cost, groups):
        return ipot_plan(cost, groups, epsilon)

    def unregularised(before: TransportInfo) -> TransportInfo:
        if on_cpu and cost.shape[0] == cost.shape[1]:
            found = jax.lax.platform_dependent(cost, groups, cpu=exact_plan, default=proximal)
        else:
            found = proximal(cost, groups)
        total = jnp.sum(jnp.where(found.coupling > 0, found.coupling * cost, 0))
        converged = found.converged & jnp.isfinite(total)  # the exact solver takes any cost
        return found._replace(converged=converged, n_iters=before.n_iters + found.n_iters)

    return jax.lax.cond(entropic.converged, lambda same: same, unregularised, entropic)


SOLVERS = ("auto", "exact", "sinkhorn", "ipot")
# What `w2`, `cw2` and `jw2` take where nothing is said: the one place to change it.
DEFAULT_SOLVER = "auto"
# "auto" where the program is known to be for a CPU: what `for_cpu` puts in, and nobody writes.
AUTO_ON_CPU = "auto, on a CPU"
# Those that start from a matrix of costs; the exact one has more to gain (`_transport`).
COUPLINGS: dict[str, Callable[[jax.Array, Groups, float], TransportInfo]] = {
    "sinkhorn": transport_plan,
    "ipot": ipot_plan,
}
