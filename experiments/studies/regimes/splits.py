"""Which images are for what: drawn by seed, and never one image for two purposes."""

from typing import NamedTuple

import numpy as np

from .study import NOISE, Study

_ORDER = 0  # the seed of which images are held out, the same for every student


class Split(NamedTuple):
    """Numbers of training images.

    Attributes:
      train: with labels, for the cross-entropy.
      validation: with labels, for lambda or the learning rate alone.
      transfer: without labels.
      labels: ``[n]``, what is believed to be the labels of all training images: under noise some
        are wrong, in training and validation alike.
    """

    train: np.ndarray
    validation: np.ndarray
    transfer: np.ndarray
    labels: np.ndarray


def held_out(study: Study, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images to train on, the teacher's too, and those that are held out."""
    order = np.random.default_rng(_ORDER).permutation(total)
    return np.sort(order[study.held :]), np.sort(order[: study.held])


def labelled(study: Study, regime: str, labels: np.ndarray, seed: int) -> Split:
    """Draw the images of one of the regimes with labels, or of the one without any."""
    rng = np.random.default_rng([seed, 1])
    pool, held = held_out(study, len(labels))
    if regime not in study.labels:
        nothing = np.empty(0, int)
        return Split(nothing, nothing, pool, labels)
    for_training, for_validation = study.labels[regime]
    train = stratified(rng, pool, labels, for_training)
    validation = stratified(rng, held, labels, for_validation)
    if regime == "noise":
        return Split(train, validation, train, corrupted(rng, labels))
    transfer = np.setdiff1d(pool, train) if regime == "transfer" else np.empty(0, int)
    return Split(train, validation, transfer, labels)


class Parts(NamedTuple):
    """Numbers of training images for a shifted domain.

    Attributes:
      bank: clean, what is left of the teacher.
      clean: what the student was trained on.
      shifted: without labels, what it is adapted to.
      validation: shifted, with labels, for the learning rate alone.
      test: numbers of the test images.
    """

    bank: np.ndarray
    clean: np.ndarray
    shifted: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def shifted(
    study: Study, labels: np.ndarray, test_labels: np.ndarray, seed: int, *, unequal: bool
) -> Parts:
    """Draw the images of an adaptation; with unequal class shares in the shifted domain."""
    rng = np.random.default_rng([seed, 2])
    pool, held = held_out(study, len(labels))
    bank, clean, target = np.array_split(rng.permutation(pool), 3)
    test = np.arange(len(test_labels))
    if unequal:
        shares = 0.75 ** rng.permutation(labels.max() + 1)
        target = thinned(rng, target, labels, shares)
        held, test = thinned(rng, held, labels, shares), thinned(rng, test, test_labels, shares)
    validation = rng.choice(held, min(study.shifted_labels, len(held)), replace=False)
    return Parts(*map(np.sort, (bank, clean, target, validation, test)))


def stratified(rng, images: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Draw so many images, as many of each class as of any other, but for the remainder."""
    if count >= len(images):
        return images
    classes = np.unique(labels)
    order = rng.permutation(images)
    # The first of each class, then the second of each, and so on.
    place = np.empty(len(order), int)
    for one in classes:
        of_class = np.flatnonzero(labels[order] == one)
        place[of_class] = np.arange(len(of_class))
    return np.sort(order[np.argsort(place, kind="stable")[:count]])


def thinned(rng, images: np.ndarray, labels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Keep of each class a part in proportion to its share, all of the largest."""
    keep = rng.random(len(images)) < (shares / shares.max())[labels[images]]
    return images[keep]


def corrupted(rng, labels: np.ndarray) -> np.ndarray:
    """Give a part NOISE of all labels another class, each other one equally often."""
    k = labels.max() + 1
    wrong = rng.random(len(labels)) < NOISE
    return np.where(wrong, (labels + rng.integers(1, k, len(labels))) % k, labels).astype(
        labels.dtype
    )
