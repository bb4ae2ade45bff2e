"""Losses between predictions: kd (Hinton), and wkd_l with the matrix of costs between classes."""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd2m_jax.losses._checks import (
    class_labels,
    emptied,
    flag,
    floating,
    integer,
    kept_rows,
    labelled_rows,
    loss,
    matrix,
    number,
    paired_logits,
    row_mean,
    several_classes,
)
from kd2m_jax.losses._numerics import HIGHEST, magnitude


@loss
def kd(
    logits_s: ArrayLike,
    logits_t: ArrayLike,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Knowledge distillation of Hinton et al.: KL divergence between softened predictions.

    ``T^2 / n sum_i KL(softmax(h_T,i / T) || softmax(h_S,i / T))``. The factor T^2 keeps the size
    of the gradient when T changes; as T grows the loss becomes ``1/(2 k)`` times the squared
    distance between centred logits.

    The published loss ``alpha CE + b T^2 KL`` has T = 4, alpha = 0.1 and b = 0.9: that is
    ``task_coef=0.1, coef=0.9`` in `distillation_loss` and `kd2m_jax.fit`.

    With ``standardize=True`` each row of logits is first brought to mean 0 and standard deviation
    1, ``(h_i - mean h_i) / std h_i``. The student need not reach the size of the teacher's logits,
    only their relations, and T is relative to their spread. Std divides by k; the authors' code
    divides by k - 1, which is a T ``sqrt(k / (k - 1))`` times as large inside the softmax.

    Cost: O(n k).

    Args:
      logits_s: ``[n, k]`` float, the student's unnormalised log-probabilities.
      logits_t: ``[n, k]`` float, the teacher's, of the same examples.
      temperature: > 0, T.
      standardize: whether to take z-scores of each row of logits in the logits' place. A row of
        equal logits has none: it becomes zeros, with a gradient of 0. Of two classes z-scores are
        1 and -1, whatever the logits are: it takes three or more.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

    Returns:
      Scalar, nats times T^2, float32 (float64 for float64 logits).

    Raises:
      ValueError: shapes that differ, a single class, two classes with standardize, temperature
        <= 0.
      TypeError: logits that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> sure, unsure = jnp.array([[jnp.log(3.0), 0.0]]), jnp.zeros((1, 2))
      >>> print(f"{kd(unsure, sure, temperature=1.0):.4f}")  # 3/4 log(3/2) + 1/4 log(1/2)
      0.1308

    References:
      Hinton, Vinyals & Dean, arXiv 1503.02531, section 2. Standardized logits: Sun et al., Logit
      Standardization in Knowledge Distillation, CVPR 2024.
    """
    number("temperature", temperature)
    logits_s, logits_t = paired_logits(logits_s, logits_t, paired=True)
    several_classes("kd", logits_s.shape[1])
    keep = kept_rows(where, len(logits_s), len(logits_t))
    logits_s, logits_t = emptied(keep, logits_s, logits_t)
    if flag("standardize", standardize):
        if logits_s.shape[1] == 2:
            raise ValueError(
                "kd: standardized logits of two classes are 1 and -1, with nothing to learn: leave "
                "standardize out"
            )
        logits_s, logits_t = _standardized(logits_s), _standardized(logits_t)
    return temperature**2 * row_mean(_divergence(logits_s, logits_t, temperature), keep)


def _standardized(logits: jax.Array) -> jax.Array:
    """Return ``[n, k]`` rows of mean 0 and standard deviation 1; those of equal logits are 0."""
    # Seen from one of them, equal logits are zeros, which a mean that is rounded does not give.
    logits = logits - jax.lax.stop_gradient(logits[:, :1])
    logits = logits / magnitude(logits, axis=1)
    gaps = logits - jnp.mean(logits, axis=1, keepdims=True)
    variance = jnp.mean(gaps**2, axis=1, keepdims=True)
    flat = variance == 0  # so that NaN stays NaN
    return jnp.where(flat, 0, gaps / jnp.sqrt(jnp.where(flat, 1, variance)))


def _divergence(logits_s: jax.Array, logits_t: jax.Array, temperature: float) -> jax.Array:
    """``[n]``, KL(p_T || p_S) of the softmaxes at a temperature.

    Where the logits differ by little, ``log(1 + sum_c p_T(c) (exp(g_c) - 1 - g_c))`` with their
    difference g less its mean under p_T: the terms of first order, which cancel, are left out.
    """
    log_s = jax.nn.log_softmax(logits_s / temperature)
    log_t = jax.nn.log_softmax(logits_t / temperature)
    p_t = jnp.exp(log_t)
    gap = (logits_s - logits_t) / temperature
    spread = jnp.max(gap, axis=1, keepdims=True) - jnp.min(gap, axis=1, keepdims=True)
    near = spread < 1
    gap = jnp.where(near, gap, 0)
    gap = gap - jnp.sum(p_t * gap, axis=1, keepdims=True)
    terms = 1.0
    for k in range(20 if gap.dtype == jnp.float64 else 12, 2, -1):
        terms = 1 + gap * (1 / k) * terms
    little = jnp.log1p(jnp.sum(p_t * gap**2 * terms, axis=1) / 2)
    return jnp.where(near[:, 0], little, jnp.sum(p_t * (log_t - log_s), axis=1))


@loss
def wkd_l(
    logits_s: ArrayLike,
    logits_t: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: float = 8.0,
    target_coef: float = 1 / 600,
    epsilon: float = 0.05,
    n_iters: int = 10,
    class_cost: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Wasserstein distance between the predictions, over the classes (WKD-L).

    ``1/n sum_i (<P_i, C> + target_coef L_t,i)``. P_i carries the student's softmax at temperature
    T, over the classes other than example i's own, to the teacher's; to move a unit of
    probability from class a to class b costs ``C_ab``, so what the student gives to a class like
    the one that the teacher meant costs little. The own class is matched apart, at temperature 1:
    ``L_t,i = -p_T,i(y_i) log p_S,i(y_i)``.

    The published loss is ``CE + L_t + lambda WD``. With ``coef`` = lambda in `distillation_loss`
    or `kd2m_jax.fit`, ``target_coef = 1/lambda`` gives exactly that; the defaults are the
    published resnet32x4 -> resnet8x4 on CIFAR-100: lambda = 600, T = 8. A schedule of ``coef``
    (see `wkd_f`) moves both terms together, where the published one leaves L_t alone: for that,
    add L_t in your own loop and set ``target_coef=0``.

    P_i is what ``n_iters`` Sinkhorn iterations make of it, not the optimal plan: a definition, as
    published, not an approximation to be improved. The student's marginal is met exactly, the
    teacher's nearly, and the value is not 0 at equality. The logits enter through the marginals,
    so here the plan is no constant for the gradient: the gradient is that of the value, through
    the iterations (``[n, k]`` numbers each, for all examples share the matrix of the costs).

    Cost: time O(n k^2), memory O(n k).

    Args:
      logits_s: ``[n, k]`` float, the student's unnormalised log-probabilities, k >= 2.
      logits_t: ``[n, k]`` float, the teacher's, of the same examples.
      labels: ``[n]`` integers in [0, k), the classes. A row of -1 is left out; other numbers make
        the loss NaN.
      temperature: > 0, T, of the distance alone, which has no factor T^2.
      target_coef: >= 0, the weight of L_t relative to the distance.
      epsilon: > 0, the strength of Sinkhorn's entropy, in the unit of the costs. Costs above 40
        epsilon look the same to the iterations, but not to the value.
      n_iters: >= 1, Sinkhorn iterations.
      class_cost: ``[k, k]`` float, C, in [0, 1] with a zero diagonal, as `class_cost_matrix` makes
        it from the teacher's features. By default every pair of classes costs 1, and the distance
        is near the total variation between the two predictions. It may be traced, and has a
        gradient.
      where: ``[n]`` bool, the rows that count; None for all. A row that does not is as if it
        were not there, on both sides, whatever it holds.

    Returns:
      Scalar, the unit of the costs (plus nats times target_coef), float32 (float64 for float64
      logits).

    Raises:
      ValueError: shapes that do not match, a single class, an option out of range.
      TypeError: labels that are not integers, logits or costs that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([[0.5, 0.4, 0.1]]))
      >>> student = jnp.log(jnp.array([[0.5, 0.1, 0.4]]))
      >>> label = jnp.array([0])
      >>> print(f"{wkd_l(student, teacher, label, temperature=1.0, target_coef=0):.2f}")
      0.60

    References:
      Lv, Yang & Li, Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
      Distillation, NeurIPS 2024 (arXiv 2412.08139).
    """
    number("temperature", temperature)
    number("target_coef", target_coef, positive=False)
    number("epsilon", epsilon)
    n_iters = integer("n_iters", n_iters)
    logits_s, logits_t = paired_logits(logits_s, logits_t, paired=True)
    n, k = logits_s.shape
    several_classes("wkd_l", k)
    labels, keep = labelled_rows(labels, where, n)
    logits_s, logits_t = emptied(keep, logits_s, logits_t)
    own = labels[:, None] == jnp.arange(k)[None, :]
    cost = 1 - jnp.eye(k) if class_cost is None else floating("class_cost", class_cost)
    if cost.shape != (k, k):
        raise ValueError(f"class_cost must have shape {[k, k]}, got {list(cost.shape)}")
    distance = _distance_over_other_classes(
        logits_s / temperature, logits_t / temperature, own, cost.astype(logits_s.dtype),
        epsilon, n_iters,
    )  # fmt: skip
    log_s, log_t = jax.nn.log_softmax(logits_s), jax.nn.log_softmax(logits_t)
    target = -jnp.sum(jnp.where(own, jnp.exp(log_t) * log_s, 0), axis=1)
    value = row_mean(distance + target_coef * target, keep)
    # A logit of -inf is a probability of 0 in the sums above, and a label that is no class leaves
    # them out: neither may pass for a finite loss.
    sound = jnp.all(jnp.isfinite(logits_s)) & jnp.all(jnp.isfinite(logits_t))
    return value * jnp.where(sound & jnp.all(jnp.any(own, axis=1) | ~keep), 1, jnp.nan)


def class_cost_matrix(
    features: ArrayLike, labels: ArrayLike, *, num_classes: int, kappa: float = 1.0
) -> jax.Array:
    r"""How far apart the classes are in the teacher's eyes: the costs for `wkd_l`.

    ``C_ab = 1 - exp(-kappa (1 - CKA_ab))``, where the linear CKA of two classes compares their
    feature rows ``X [r, d]``, centred by class: ``||X_a^T X_b||_F^2 / (||X_a^T X_a||_F
    ||X_b^T X_b||_F)``. CKA wants equally many rows, so each class gives its first r, r being the
    size of the smallest class. Row i of one class meets row i of the other: which rows meet is
    an accident of their order, in the published method too.

    Done once, before training, on the features (or the logits) of the training set, and outside
    `jax.jit`. It takes O(k r^2 d + k^2 r^2) operations for k classes.

    Args:
      features: ``[n, d]`` float, the teacher's, of examples of every class.
      labels: ``[n]`` integers in [0, num_classes), their classes; rows of -1 are left out.
      num_classes: k.
      kappa: > 0, how sharply the cost rises with dissimilarity; 1 as published.

    Returns:
      ``[k, k]``, symmetric, in [0, 1) with a zero diagonal, float32 (float64 for float64).

    Raises:
      ValueError: shapes that do not match, labels out of range, a class with fewer than two rows,
        kappa <= 0.
      TypeError: labels that are not integers or are traced, features that are not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> features = jnp.array([1.0, -1, 0, 2, -2, 0, 1, 1, -2])[:, None]
      >>> cost = class_cost_matrix(features, jnp.repeat(jnp.arange(3), 3), num_classes=3)
      >>> print(cost.round(2))  # classes 0 and 1 differ in size alone; 1 - 1/e is the largest
      [[0.   0.   0.63]
       [0.   0.   0.63]
       [0.63 0.63 0.  ]]

    References:
      Lv, Yang & Li, NeurIPS 2024; CKA: Kornblith et al., ICML 2019.
    """
    number("kappa", kappa)
    features = matrix("features", features)
    labels = class_labels(labels, features.shape[0])
    if isinstance(labels, jax.core.Tracer):
        raise TypeError("class_cost_matrix is computed once, before training: call it outside jit")
    classes = np.asarray(labels)
    if classes.min() < -1 or classes.max() >= num_classes:
        raise ValueError(
            f"labels must be in [0, {num_classes}), got {classes.min()} to {classes.max()}"
        )
    features = jnp.asarray(np.asarray(features))  # from however many devices to the default one
    members = [np.flatnonzero(classes == c) for c in range(num_classes)]
    rows = min(map(len, members))
    if rows < 2:
        poorest = min(range(num_classes), key=lambda c: len(members[c]))
        raise ValueError(f"CKA needs two rows of each class, class {poorest} has {rows}")
    x = features[np.stack([m[:rows] for m in members])]  # [k, r, d]
    x = x - jnp.mean(x, axis=1, keepdims=True)
    size = jnp.sqrt(jnp.sum(x**2, axis=(1, 2), keepdims=True))
    x = x / jnp.where(size > 0, size, 1)  # CKA does not see the scale, and float32 does
    # ||X_a^T X_b||^2 is the inner product of the Gram matrices X_a X_a^T and X_b X_b^T, summed
    # over blocks of their rows, so that k Gram matrices never stand in memory at once.
    products = jnp.zeros((num_classes, num_classes), x.dtype)
    for start in range(0, rows, 64):
        gram = jnp.einsum("krd,ksd->krs", x[:, start : start + 64], x, precision=HIGHEST)
        gram = gram.reshape(num_classes, -1)
        products += jnp.matmul(gram, gram.T, precision=HIGHEST)
    norm = jnp.sqrt(jnp.diag(products))
    norm = jnp.where(norm > 0, norm, 1)  # a class of one point is like no other
    cka = products / (norm[:, None] * norm[None, :])
    cost = -jnp.expm1(-kappa * jnp.maximum(1 - cka, 0))
    return jnp.where(jnp.eye(num_classes, dtype=bool), 0, cost)


def _distance_over_other_classes(
    scaled_s: jax.Array,
    scaled_t: jax.Array,
    own: jax.Array,
    cost: jax.Array,
    epsilon: float,
    n_iters: int,
) -> jax.Array:
    """``[n]``, the cost of Sinkhorn's plan between the softmaxes without each row's own class.

    In the log domain, yet by matrix products: the kernel ``exp(-C / epsilon)`` is the same for
    all rows, and with the largest potential of each row taken out, ``K exp(g)`` lies between K's
    smallest entry and k, so nothing underflows.
    """
    # The root of the smallest number leaves room for the reciprocals of the backward pass.
    tiny = float(jnp.finfo(cost.dtype).tiny) ** 0.5
    kernel = jnp.maximum(jnp.exp(-cost / epsilon), tiny)
    # Far below any log-probability, and finite: -inf would meet 0 in the gradient.
    log_s, log_t = (jax.nn.log_softmax(jnp.where(own, -1e30, h)) for h in (scaled_s, scaled_t))

    def weights(potential):
        """``exp(potential)`` over the other classes, 1 at the largest, and that largest."""
        top = jnp.max(jnp.where(own, -jnp.inf, potential), axis=1, keepdims=True)
        top = jax.lax.stop_gradient(top)  # it cancels
        return jnp.where(own, 0, jnp.exp(jnp.where(own, 0, potential - top))), top

    def log_sum(potential, kernel):
        w, top = weights(potential)
        return top + jnp.log(jnp.matmul(w, kernel, precision=HIGHEST))

    def iterate(g, _):
        f = log_s - log_sum(g, kernel.T)
        return log_t - log_sum(f, kernel), None

    g = log_t - log_sum(jnp.zeros_like(log_s), kernel)
    g, _ = jax.lax.scan(iterate, g, length=n_iters - 1)
    # The last half iteration meets the student's marginal: each class's mass goes to the others
    # in proportion to K exp(g), so the cost is a mean of mean costs.
    w, _ = weights(g)
    spent = jnp.matmul(w, (kernel * cost).T, precision=HIGHEST)
    return jnp.sum(jnp.exp(log_s) * spent / jnp.matmul(w, kernel.T, precision=HIGHEST), axis=1)
