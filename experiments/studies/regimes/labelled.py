"""Students that learn from labels and a teacher, or from a teacher alone: one row, one seed."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
import optax
from scipy import optimize
from scipy.spatial import distance

from kd2m_jax import NonFiniteLoss, Outputs, fit, outputs, predict

from .networks import World, student
from .rows import Row
from .splits import Split, labelled
from .study import AUTO, FIXED, LABEL_FREE, LAMBDAS, PAIRED, RATE, WIDEST, Coefs, Study

Tried = dict[str, list[float] | None]


def trained(
    world: World,
    study: Study,
    regime: str,
    row: Row,
    seed: int,
    coefs: Coefs | None = None,
) -> dict[str, Any]:
    """Train a row's students of one seed in one program, one per lambda.

    ``coefs=None`` takes the study's grid and widens it, see `beyond`.

    Returns:
      ``{"tried": {lambda: [validation, test]}, "cpu_seconds": ...}``: accuracies in percent. A
      lambda whose run diverged has None.
    """
    start = time.process_time()
    split = labelled(study, regime, world.y, seed)
    steps = {"full": study.full_steps, "noise": study.noise_steps}.get(regime, study.steps)
    study = dataclasses.replace(study, steps=steps // 3 if row.shorter else steps)
    if row.metric is None:
        tried = _tried(world, study, row, seed, split, ("none",))
    else:
        tried = _tried(world, study, row, seed, split, coefs or (*LAMBDAS, *AUTO))
        while coefs is None and (more := beyond(tried)):
            tried |= _tried(world, study, row, seed, split, more)
    return {"tried": tried, "cpu_seconds": round(time.process_time() - start, 1)}


def beyond(tried: Tried) -> Coefs:
    """Return the next lambda to try where the best of validation is at an end of the grid.

    The smallest of equals counts, as in the table. None beyond WIDEST, none where all diverged.
    """
    lambdas = sorted(float(name) for name in tried if not name.startswith("auto"))
    scores = {one: score[0] for one in lambdas if (score := tried[str(one)])}
    if not scores:
        return ()
    best = max(scores, key=scores.__getitem__)
    if best == lambdas[0] and best > WIDEST[0]:
        return (float(f"{best / 10:g}"),)
    if best == lambdas[-1] and best < WIDEST[1]:
        return (float(f"{best * 10:g}"),)
    return ()


def _tried(world: World, study: Study, row: Row, seed: int, split: Split, coefs: Coefs) -> Tried:
    try:
        found = _fitted(world, study, row, seed, split, coefs)
    except NonFiniteLoss:
        if len(coefs) == 1:
            return {str(coefs[0]): None}
        # One that diverged ends the program of all: each alone.
        alone = [_tried(world, study, row, seed, split, (coef,)) for coef in coefs]
        return {name: value for one in alone for name, value in one.items()}
    scored = (
        (split.validation, world.x, split.labels),
        (np.arange(len(world.test_y)), world.test_x, world.test_y),
    )
    return {
        str(coef): [accuracy(model, x[rows], y[rows]) for rows, x, y in scored]
        for coef, model in zip(coefs, found, strict=True)
    }  # fmt: skip


def _fitted(
    world: World, study: Study, row: Row, seed: int, split: Split, coefs: Coefs
) -> list[Any]:
    """Train, and return the students."""
    train = np.union1d(split.train, split.validation) if row.all_labels else split.train
    options: dict[str, Any] = {}
    # Under noise the distance sees the same images, without their labels.
    beside = len(np.setdiff1d(split.transfer, train))
    if row.metric is not None:
        seen = world.seen_untrained if row.untrained else world.seen
        options = {"metric": row.metric, "coef": list(coefs)}
        if len(split.transfer):
            options["transfer"] = world.x[split.transfer], rows_of(seen, split.transfer)
            options["transfer_batch_size"] = min(study.transfer_batch, len(split.transfer))
        else:
            options["teacher"] = rows_of(seen, train)
    results = fit(
        student(world.dataset, study, seed),
        (world.x[train], split.labels[train]),
        **options,
        **schedule(study.steps, RATE),
        batch_size=min(study.batch_beside if beside else study.batch, len(train)),
        seed=seed,
    )
    return [one.student for one in (results if isinstance(results, list) else [results])]


def label_free(world: World, study: Study, row: Row, seed: int) -> dict[str, Any]:
    """Train a student on a metric alone, and classify by the nearest of its class means.

    The classes of the training images are the teacher's: no label is read. Of no metric the
    student is as it was initialised.
    """
    start = time.process_time()
    split = labelled(study, LABEL_FREE, world.y, seed)
    pool = split.transfer
    model, seen = student(world.dataset, study, seed), rows_of(world.seen, pool)
    if row.metric is not None:
        against = world.seen_untrained if row.untrained else world.seen
        model = fit(
            model,
            (world.x[pool], None),
            teacher=rows_of(against, pool),
            metric=row.metric,
            task_coef=0,
            **schedule(study.steps, RATE),
            batch_size=study.batch,
            seed=seed,
        ).student
    classes = np.asarray(seen.logits).argmax(1)
    features, test_features = (
        np.asarray(outputs(model, x).features) for x in (world.x[pool], world.test_x)
    )
    found = nearest_mean(features, classes, test_features)
    score = 100 * float(np.mean(found == world.test_y))
    return {"tried": {"none": (None, score)}, "cpu_seconds": round(time.process_time() - start, 1)}


def paired(world: World, study: Study, row: Row, seed: int) -> dict[str, Any]:
    """Look which of the teacher's classes optimal transport pairs a student's classes with.

    Of a student with few labels whose distance, at lambda 1, sees images without: before and after
    training, over the first test images.

    Returns:
      ``{"right": [before, after], "pairs": the counts after [true class][class of the teacher's
      row], "tried": ..., "cpu_seconds": ...}``; right is the share of pairs of one class.
    """
    start = time.process_time()
    split = labelled(study, "transfer", world.y, seed)
    before = student(world.dataset, study, seed)
    (after,) = _fitted(world, study, row, seed, split, (FIXED,))
    x, y = world.test_x[:PAIRED], world.test_y[:PAIRED]
    theirs = np.asarray(outputs(world.teacher, x).features)
    partners = [_partners(np.asarray(outputs(m, x).features), theirs) for m in (before, after)]
    pairs = np.zeros((y.max() + 1, y.max() + 1), int)
    np.add.at(pairs, (y, y[partners[1]]), 1)
    return {
        "right": [float(np.mean(y == y[found])) for found in partners],
        "pairs": pairs.tolist(),
        "tried": {str(FIXED): [None, accuracy(after, world.test_x, world.test_y)]},
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def _partners(z_s: np.ndarray, z_t: np.ndarray) -> np.ndarray:
    """Return the row that each row is moved to by the cheapest plan in squared distances."""
    return optimize.linear_sum_assignment(distance.cdist(z_s, z_t, "sqeuclidean"))[1]


def schedule(steps: int, rate: float) -> dict[str, Any]:
    """Return the options of `fit` for so many steps of Adam, its rate falling to 0 by a cosine."""
    return {
        "optimizer": optax.adam(optax.cosine_decay_schedule(rate, steps)),
        "epochs": steps,  # more than there will be: max_steps ends the run
        "max_steps": steps,
        "log_every": steps,
        "progress": False,
    }


def rows_of(seen: Outputs, rows: np.ndarray) -> Outputs:
    """Return a teacher's outputs for some images."""
    return jax.tree.map(lambda a: a[rows], seen)


def accuracy(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Return the share of images whose class is predicted, in percent."""
    return 100 * float(np.mean(predict(model, x).argmax(1) == y))


def nearest_mean(features: np.ndarray, classes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the class of the nearest mean of the features, for each of the others."""
    present = np.unique(classes)
    means = np.stack([features[classes == one].mean(0) for one in present])
    return present[((others[:, None, :] - means) ** 2).sum(2).argmin(1)]
