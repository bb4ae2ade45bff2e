"""Optimal transport between features: w2, cw2, jw2.

All three are one problem, ``min_P <P, C>`` over couplings of two weighted clouds; they differ
in the cost C and in who may be matched with whom (`Groups`). The coupling is a constant for
the gradient: no differentiation through solver iterations (envelope theorem).
"""

import functools
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import (
    apart_labels,
    choice,
    clouds,
    filled,
    flag,
    kept_rows,
    labelled_rows,
    loss,
    number,
    paired_logits,
)
from kd2m_jax.losses._costs import LABEL_COSTS, between_features, between_features_and_logits
from kd2m_jax.losses._couplings import aligned, transport
from kd2m_jax.losses._groups import by_class, by_classes_apart, everyone
from kd2m_jax.losses._solvers import DEFAULT_SOLVER, TransportInfo

WithInfo = tuple[jax.Array, TransportInfo]


class _Options(TypedDict, total=False):
    """What `w2`, `cw2` and `jw2` share, for the types of their calls."""

    solver: str
    epsilon: float
    debiased: bool
    where: ArrayLike | None


class _ConditionalOptions(_Options, total=False):
    rotation: bool
    labels_t: ArrayLike | None


class _JointOptions(_Options, total=False):
    beta: float
    label_cost: str


@overload
def w2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    *,
    has_aux: Literal[False] = False,
    **options: Unpack[_Options],
) -> jax.Array: ...
@overload
def w2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    *,
    has_aux: Literal[True],
    **options: Unpack[_Options],
) -> WithInfo: ...
@loss
def w2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    *,
    solver: str = DEFAULT_SOLVER,
    epsilon: float = 0.01,
    debiased: bool = False,
    has_aux: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array | WithInfo:
    r"""Squared 2-Wasserstein distance between two empirical feature distributions.

    ``W2^2 = min_P sum_ij P_ij ||z_s,i - z_t,j||^2`` over couplings P of the uniform weights
    1/n and 1/m. Which example a feature came from does not matter, only the distribution.

    ==========  =======  ===========================  ========================================
    solver      n and m  value                        gradient
    ==========  =======  ===========================  ========================================
    "exact"     n = m    exact, up to rounding        exact
    "sinkhorn"  any      0% to 1% above, with         of the entropic cost, 20% to 60% away
                         epsilon = 0.01               from the exact one on clustered clouds
    "ipot"      any      within 0.1%                  of a plan that is so near
    ==========  =======  ===========================  ========================================

    "auto" is "exact" on a CPU where n = m, else "sinkhorn".

    "exact" pairs samples by shortest augmenting paths, which is sequential: for CPUs, where it is
    the faster one (measured up to n = 2,048), and not for GPUs. "auto" is decided
    for the platform that a program is compiled for; a second derivative of it is zero. Where
    Sinkhorn is not on the way to converge within 500 iterations (clusters that hold different
    mass on the two sides, say) an unregularised plan takes its place: "exact" on a CPU where n =
    m, else "ipot".

    ``solver="ipot"`` is that of Lohit & Jones, and the preset "lohit" of `get_metric`. Their
    ground cost, the weight of their loss and their number of iterations are not public: here the
    cost is the squared Euclidean one and the iterations end by a certificate, so no reproduction
    of their results is claimed.

    Between other examples (a bank) it does not know of classes: from a student with a fresh head it
    pairs wrong classes and keeps to them, and where the classes' shares differ it moves some of one
    class to another. `cw2` with ``labels_t`` does not.

    Cost: time O(n^2 d), for hard pairings up to O(n^3); memory O(n^2).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features; m may differ from n (a bank of them, say).
      solver: "auto", "exact", "sinkhorn" (in the log domain) or "ipot" (inexact proximal point):
        see the table.
      epsilon: > 0, the strength of Sinkhorn's entropy, relative to a lower bound of the cost
        itself (the better of two dual solutions, at least 0.1% of a typical cost): 0.01 keeps the
        value within about 1% of the exact one, whatever the scale of the features. For "ipot" the
        smallest proximal step, in the same unit: it decides the speed, not the value. Without
        effect for "exact".
      debiased: whether to return the Sinkhorn divergence
        ``OT_eps(s, t) - (OT_eps(s, s) + OT_eps(t, t)) / 2`` of entropic costs (the entropy in
        them) instead: 0 at equality and never negative, up to rounding. The three share the
        epsilon of student against teacher. Plain Sinkhorn lies above the exact cost, the
        divergence below it, by 0.1% to 0.9% at epsilon = 0.01. Sinkhorn only, to 2,000 iterations:
        where it is slow see `TransportInfo.converged`.
      has_aux: whether to return ``(value, TransportInfo(coupling, converged, n_iters))``.
      where: ``[n]`` bool, the rows that count, for m = n; None for all. A row that does not is
        as if it were not there, on both sides, whatever it holds.

    Returns:
      Scalar, a *squared* distance, float32 (float64 for float64 features). The gradient is
      that of ``<P, C>`` with P constant: that of the value for "exact" and when debiased.

    Raises:
      ValueError: shapes that do not match, an unknown solver, epsilon <= 0, the exact solver
        with n != m, or debiased with another solver than Sinkhorn.
      TypeError: features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z_t = jnp.array([[0.0, 0.0], [4.0, 0.0]])
      >>> z_s = z_t[::-1].at[:, 1].add(1.0)  # the other way round, moved up by one
      >>> print(f"{w2(z_s, z_t):.4f}")
      1.0000

    References:
      Fernandes Montesuma, KD2M, GSI 2025, W2 (E). Sinkhorn: Cuturi, NeurIPS 2013. Divergence:
      Feydy et al., AISTATS 2019. Assignment: Balas et al., JACM 1991. IPOT: Xie et al., UAI 2019,
      in distillation Lohit & Jones, WACV 2022.
    """
    z_s, z_t = clouds(z_s, z_t)
    keep = kept_rows(where, len(z_s), len(z_t))
    z_s, z_t = filled(keep, z_s, z_t)
    groups = everyone(len(z_s), len(z_t), z_s.dtype, keep).separated()
    return transport(between_features, z_s, z_t, groups, solver, epsilon, debiased, has_aux)


@overload
def cw2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    labels: ArrayLike,
    *,
    has_aux: Literal[False] = False,
    **options: Unpack[_ConditionalOptions],
) -> jax.Array: ...
@overload
def cw2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    labels: ArrayLike,
    *,
    has_aux: Literal[True],
    **options: Unpack[_ConditionalOptions],
) -> WithInfo: ...
@loss
def cw2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    labels: ArrayLike,
    *,
    solver: str = DEFAULT_SOLVER,
    epsilon: float = 0.01,
    debiased: bool = False,
    rotation: bool = False,
    has_aux: bool = False,
    labels_t: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array | WithInfo:
    r"""Class-conditional squared 2-Wasserstein distance: W2^2 within each class, averaged.

    ``CW2^2 = 1/K sum_y W2^2(P_S(Z|Y=y), P_T(Z|Y=y))`` over the K classes present in the batch,
    computed as one masked problem whose cost does not depend on K.

    A class with one sample contributes that pair's squared distance, so with many classes and
    small batches CW2 is nearly `l2`, which is there to compare: of 100 equally frequent classes a
    batch of 128 has 72 on average, and half of those have one sample. Batches of fewer classes
    with more samples each come from `kd2m_jax.fit` with ``per_class=4``, say.

    With ``rotation=True`` it is a Wasserstein-Procrustes distance by class: both clouds are seen
    from the mean of their class means, and the teacher's is turned by an orthogonal Q. A first Q
    is the polar factor of ``1/K sum_y m_T,y^T m_S,y`` of the class means, in the K - 1 directions
    that they span. The Q that counts is that of ``Z_T^T P^T Z_S``, with the coupling P within
    classes that the first one gives. So Q and P are improved in turn, from the class means towards
    a local optimum of ``min_Q CW2^2(z_s, z_t Q)``, which need not be the best one: with fewer
    classes than features the value may be above the one without a rotation. What neither
    determines (a single class, a collapsed network) stays as near to unturned as may be. Solvers
    couple otherwise, so they turn otherwise and end in other local optima: their values may differ
    by several times, either way.

    Q is a constant for the gradient. The gradient is that of the value where Q is the best one
    for the last P too. What it gives up is the teacher's space: the student matches the classes
    in a space of its own, and a classifier of the teacher no longer fits its features.

    Cost: as `w2`, whatever the number of classes; with rotation twice that, and time O(d^3)
    for two singular value decompositions, three where Q is not determined: on a CPU 1 ms for
    d = 64 and 0.3 s for d = 512.

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[n, d]`` float, the teacher's features of the same examples.
      labels: ``[n]`` integers >= 0, their classes. A row of -1 is left out; other numbers make
        the loss NaN.
      solver: "auto", "exact", "sinkhorn" or "ipot", as in `w2`.
      epsilon: > 0, as in `w2`, over the pairs within a class.
      debiased: whether to return the mean of the classes' Sinkhorn divergences, as in `w2`.
      rotation: whether the distance is that after a rotation of the teacher's space.
      has_aux: whether to return ``(value, TransportInfo)`` as in `w2`.
      labels_t: ``[m]`` integers, the classes of the teacher's rows, where these are of other
        examples: m may differ from n. Classes that are on one side alone are left out.
      where: as in `w2`.

    Returns:
      Scalar, a *squared* distance, float32 (float64 for float64 features); 0 without any class.

    Raises:
      ValueError: shapes that do not match, an unknown solver, epsilon <= 0, debiased with
        another solver than Sinkhorn, labels_t with the exact solver or with where.
      TypeError: labels that are not integers, features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z_t = jnp.array([[0.0], [1.0], [5.0]])
      >>> z_s = jnp.array([[1.0], [0.0], [7.0]])
      >>> print(f"{cw2(z_s, z_t, jnp.array([0, 0, 1])):.4f}")  # (0 + 2^2) / 2
      2.0000

    References:
      Fernandes Montesuma, KD2M, GSI 2025, CW2 (E).
    """
    if labels_t is not None:
        given = z_s, z_t, labels, labels_t, where
        value, info = _apart(*given, solver, epsilon, debiased, rotation)
        return (value, info) if has_aux else value
    z_s, z_t = clouds(z_s, z_t, paired=True)
    labels, keep = labelled_rows(labels, where, len(z_s))
    z_s, z_t = filled(keep, z_s, z_t)
    groups = by_class(labels, keep, z_s.dtype)
    if flag("rotation", rotation):
        z_s, z_t = aligned(between_features, z_s, z_t, groups, solver, epsilon, debiased)
    return transport(between_features, z_s, z_t, groups, solver, epsilon, debiased, has_aux)


def _apart(z_s, z_t, labels, labels_t, where, solver, epsilon, debiased, rotation) -> WithInfo:
    """`cw2` where each side has its own labels."""
    z_s, z_t = clouds(z_s, z_t)
    labels, labels_t = apart_labels(labels, labels_t, where, len(z_s), len(z_t))
    n, m = len(z_s), len(z_t)
    # One more row on either side that does not count: where others do not, they have a partner.
    z_s, z_t = (jnp.pad(z, ((0, 1), (0, 0))) for z in (z_s, z_t))
    labels, labels_t = (jnp.pad(one, (0, 1), constant_values=-1) for one in (labels, labels_t))
    groups = by_classes_apart(labels, labels_t, z_s.dtype)
    (z_s,), (z_t,) = filled(groups.keep, z_s), filled(groups.keep_t, z_t)
    if flag("rotation", rotation):
        z_s, z_t = aligned(between_features, z_s, z_t, groups, solver, epsilon, debiased)
    found = transport(between_features, z_s, z_t, groups, solver, epsilon, debiased, True)
    value, info = found  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]
    return value, info._replace(coupling=info.coupling[:n, :m])


@overload
def jw2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    logits_s: ArrayLike,
    logits_t: ArrayLike,
    *,
    has_aux: Literal[False] = False,
    **options: Unpack[_JointOptions],
) -> jax.Array: ...
@overload
def jw2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    logits_s: ArrayLike,
    logits_t: ArrayLike,
    *,
    has_aux: Literal[True],
    **options: Unpack[_JointOptions],
) -> WithInfo: ...
@loss
def jw2(
    z_s: ArrayLike,
    z_t: ArrayLike,
    logits_s: ArrayLike,
    logits_t: ArrayLike,
    *,
    beta: float = 1.0,
    label_cost: str = "cross_entropy",
    solver: str = DEFAULT_SOLVER,
    epsilon: float = 0.01,
    debiased: bool = False,
    has_aux: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array | WithInfo:
    r"""Squared 2-Wasserstein distance between joint distributions of features and predictions.

    ``JW2^2 = min_P sum_ij P_ij (||z_s,i - z_t,j||^2 + beta L(h_s,i, h_t,j))``, where L compares
    the prediction for student row i with that for teacher row j:

    - "cross_entropy": ``-sum_c p_T(c) log p_S(c)``, in nats, not 0 at equality;
    - "kl": ``KL(p_T || p_S)``, in nats: the cross-entropy less the teacher's entropy;
    - "sqeuclidean": ``||logits_s,i - logits_t,j||^2``.

    It has no conditional twin, for the label cost does that work: between networks that are sure
    of the right class, JW2 tends to `cw2` as beta grows (with equally frequent classes).

    Between other examples (a bank) a student with a fresh head predicts nothing yet: classes are
    paired wrongly and stay so, and where their shares differ some of one class moves to another.

    Cost: time O(n^2 (d + k)), for hard pairings up to O(n^3); memory O(n^2).

    Args:
      z_s: ``[n, d]`` float, the student's features.
      z_t: ``[m, d]`` float, the teacher's features.
      logits_s: ``[n, k]`` float, the student's unnormalised log-probabilities.
      logits_t: ``[m, k]`` float, the teacher's.
      beta: >= 0, the weight of the label cost; 0 gives `w2`.
      label_cost: "cross_entropy", "kl" or "sqeuclidean".
      solver: "auto", "exact", "sinkhorn" or "ipot", as in `w2`.
      epsilon: > 0, as in `w2`, relative to the joint cost.
      debiased: whether to return the Sinkhorn divergence, as in `w2`. It compares each network
        with itself, which takes a label cost that is symmetric and 0 between equal predictions:
        "sqeuclidean" alone.
      has_aux: whether to return ``(value, TransportInfo)`` as in `w2`.
      where: as in `w2`.

    Returns:
      Scalar, squared distance plus beta times the label cost, float32 (float64 for float64).

    Raises:
      ValueError: shapes that do not match, an unknown solver or label cost, epsilon <= 0,
        beta < 0, the exact solver with n != m, or debiased with another solver than Sinkhorn or
        another label cost than "sqeuclidean".
      TypeError: features or logits that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> z, h = jnp.array([[0.0], [1.0]]), jnp.array([[9.0, 0.0], [0.0, 9.0]])
      >>> value = jw2(z, z, h, h[::-1], beta=10.0, label_cost="kl")  # pairs predictions
      >>> print(f"{value:.2f}")
      1.00

    References:
      Fernandes Montesuma, KD2M, GSI 2025, JW2 (E); the joint cost is that of Courty et al.,
      NeurIPS 2017.
    """
    z_s, z_t = clouds(z_s, z_t)
    logits_s, logits_t = paired_logits(logits_s, logits_t)
    if (logits_s.shape[0], logits_t.shape[0]) != (z_s.shape[0], z_t.shape[0]):
        raise ValueError(
            f"logits_s and logits_t have {logits_s.shape[0]} and {logits_t.shape[0]} rows, but "
            f"z_s and z_t have {z_s.shape[0]} and {z_t.shape[0]}"
        )
    number("beta", beta, positive=False)
    choice("label_cost", label_cost, LABEL_COSTS)
    if flag("debiased", debiased) and label_cost != "sqeuclidean":
        raise ValueError(
            "debiased=True compares each network with itself, which takes a symmetric label cost: "
            f"use label_cost='sqeuclidean', not {label_cost!r}"
        )

    keep = kept_rows(where, len(z_s), len(z_t))
    z_s, z_t, logits_s, logits_t = filled(keep, z_s, z_t, logits_s, logits_t)
    groups = everyone(len(z_s), len(z_t), z_s.dtype, keep).separated()
    cost = functools.partial(between_features_and_logits, beta=beta, label_cost=label_cost)
    x, y = (z_s, logits_s), (z_t, logits_t)
    return transport(cost, x, y, groups, solver, epsilon, debiased, has_aux)
