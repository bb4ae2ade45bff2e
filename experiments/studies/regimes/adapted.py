"""A student that was trained on clean images and meets another domain: one row, one seed.

The teacher is gone. What is left of it is a bank of its features for other clean images, or their
class means and covariances: source-free adaptation with the distances of the library.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kd2m_jax import Bank, Outputs, class_statistics, fit, outputs
from kd2m_jax.internal import balanced as balanced_log_p

from .labelled import accuracy, rows_of, schedule
from .networks import World, as_seen, student
from .shifts import shift
from .splits import Parts, shifted
from .study import CONFIDENT, RATE, Study

BANK, STATISTICS, OWN, TEACHER = "bank", "statistics", "own statistics", "teacher"


class Method(NamedTuple):
    """One way to adapt.

    Attributes:
      metric: of the distance to what is left of the teacher, or None.
      against: BANK, STATISTICS, OWN (the student's, of its own clean images) or TEACHER (were it
        still there: what that would be worth).
      unlabelled: the classes of the shifted images, as in `kd2m_jax.fit`.
      loss: ``logits -> a scalar`` of the student alone, in place of a distance.
      normalises: whether nothing but the statistics of BatchNorm are taken from shifted images.
      batch: shifted images per step, None for the study's.
    """

    metric: str | None = None
    against: str = BANK
    unlabelled: str | None = None
    loss: Callable[[jax.Array], jax.Array] | None = None
    batch: int | None = None
    normalises: bool = False


def entropy(logits: jax.Array) -> jax.Array:
    """Return the mean entropy of the predictions, in nats."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=1))


def information(logits: jax.Array) -> jax.Array:
    """Return the mean entropy less the entropy of the mean (Liang et al., SHOT, ICML 2020)."""
    mean = jnp.mean(jax.nn.softmax(logits), axis=0)
    return entropy(logits) + jnp.sum(mean * jnp.log(mean + 1e-12))


def pseudo_labels(logits: jax.Array, *, balanced: bool = False) -> jax.Array:
    """Return the cross-entropy on the student's own classes, of those that are sure; or balanced.

    Sure is a probability above CONFIDENT; balanced are equal shares of the classes in the batch.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits))
    chosen = jnp.max(log_p, axis=1) > np.log(CONFIDENT)
    if balanced:
        chosen = jnp.ones_like(chosen)
        log_p = balanced_log_p(log_p, chosen, None)
    nats = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(log_p, axis=1))
    return jnp.sum(nats * chosen) / jnp.maximum(jnp.sum(chosen), 1)


NOTHING = "nothing"
METHODS: dict[str, Method] = {
    NOTHING: Method(),
    "BatchNorm statistics": Method(normalises=True),
    "entropy": Method(loss=entropy),
    "pseudo-labels, sure ones": Method(loss=pseudo_labels),
    "pseudo-labels, balanced": Method(loss=functools.partial(pseudo_labels, balanced=True)),
    "information maximisation": Method(loss=information),
    "w2, batch 128": Method("w2", batch=128),
    "w2": Method("w2"),
    "cw2, own classes": Method("cw2", unlabelled="own"),
    "cw2, balanced": Method("cw2", unlabelled="balanced"),
    "sw2": Method("sw2"),
    "scf": Method("scf"),
    "mmd-rbf": Method("mmd-rbf"),
    "gaussian-w2, statistics": Method("gaussian-w2", STATISTICS),
    "gaussian-cw2, statistics, own classes": Method("gaussian-cw2", STATISTICS, "own"),
    "gaussian-cw2, statistics, balanced": Method("gaussian-cw2", STATISTICS, "balanced"),
    "gaussian-cw2, its own statistics, balanced": Method("gaussian-cw2", OWN, "balanced"),
    "kd from the teacher, were it there": Method("kd", TEACHER),
    "l2 to the teacher, were it there": Method("l2", TEACHER),
}


class Domain(NamedTuple):
    """What the methods of one seed and shift share.

    Attributes:
      parts: which images are for what.
      source: the student that was trained on clean images.
      x: the shifted images, without labels.
      validation: shifted images and labels, for the learning rate.
      test: shifted test images and labels.
    """

    parts: Parts
    source: nnx.Module
    x: np.ndarray
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def domain(world: World, study: Study, name: str, seed: int) -> Domain:
    """Draw the images of a domain, and train the student on its clean ones."""
    unequal = name.endswith("-unequal")
    parts = shifted(study, world.y, world.test_y, seed, unequal=unequal)
    normalised = as_seen(world.dataset)
    (train, _), (test, _) = world.dataset.train, world.dataset.test

    def seen(images, rows, part):  # each part has noise of its own
        return normalised(shift(images[rows], name, (seed, part)))

    return Domain(
        parts,
        _source(world, study, parts, seed),
        seen(train, parts.shifted, 0),
        (seen(train, parts.validation, 1), world.y[parts.validation]),
        (seen(test, parts.test, 2), world.test_y[parts.test]),
    )


def _source(world: World, study: Study, parts: Parts, seed: int) -> nnx.Module:
    """Train a student on its clean images: cross-entropy, and l2 into the teacher's space."""
    return fit(
        student(world.dataset, study, seed),
        (world.x[parts.clean], world.y[parts.clean]),
        teacher=rows_of(world.seen, parts.clean),
        metric="l2",
        coef=0.1,
        **schedule(study.full_steps, RATE),
        batch_size=min(study.batch, len(parts.clean)),
        seed=seed,
    ).student


def adapted(world: World, study: Study, place: Domain, method: Method, seed: int) -> dict[str, Any]:
    """Adapt the student by one method, once per learning rate.

    Returns:
      ``{"tried": {rate: [validation, test]}, "cpu_seconds": ...}``, accuracies in percent.
    """
    start = time.process_time()
    if method.metric or method.loss:
        moved = {str(rate): _moved(world, study, place, method, rate, seed) for rate in study.rates}
    else:
        moved = {"none": _renormalised(place) if method.normalises else place.source}
    tried = {
        name: [accuracy(model, *scored) for scored in (place.validation, place.test)]
        for name, model in moved.items()
    }
    return {"tried": tried, "cpu_seconds": round(time.process_time() - start, 1)}


def methods_of(study: Study) -> tuple[str, ...]:
    """Return the names of the methods that suit a study's student."""
    suited = [
        name
        for name, m in METHODS.items()
        if (study.student_filters or not m.normalises) and m.batch != study.adaptation_batch
    ]
    return study.methods or tuple(suited)


def _renormalised(place: Domain) -> nnx.Module:
    """Take the statistics of BatchNorm from the shifted images, and leave the weights."""
    model = nnx.clone(place.source)
    model.train()
    forward = nnx.jit(lambda model, x: model(x))
    for part in np.array_split(place.x, max(1, len(place.x) // 256)):
        forward(model, part)
    model.eval()
    return model


def _moved(
    world: World, study: Study, place: Domain, method: Method, rate: float, seed: int
) -> nnx.Module:
    labels: Any = None
    if method.loss is not None:
        labels = np.zeros(len(place.x), np.int32)  # nobody reads them
        options: dict[str, Any] = {"task_loss": _of_logits(method.loss)}
    else:
        options = {
            "metric": method.metric,
            "teacher": _left(world, place, method),
            "task_coef": 0,
            "unlabelled": method.unlabelled,
        }
    return fit(
        place.source,
        (place.x, labels),
        **options,
        **schedule(study.adaptation_steps, rate),
        batch_size=min(method.batch or study.adaptation_batch, len(place.x)),
        seed=seed,
    ).student


@functools.cache  # one object per loss, so that `fit` knows the program again
def _of_logits(loss: Callable[[jax.Array], jax.Array]) -> Callable[[Outputs, jax.Array], jax.Array]:
    return lambda out, labels: loss(jnp.asarray(out.logits))


def _left(world: World, place: Domain, method: Method):
    """Return what is left of the teacher."""
    rows = place.parts.bank
    if method.against == TEACHER:
        return outputs(world.teacher, place.x)
    if method.against == BANK:
        return Bank(np.asarray(world.seen.features)[rows], labels=world.y[rows], rows=None)
    if method.against == STATISTICS:
        return class_statistics(np.asarray(world.seen.features)[rows], world.y[rows])
    clean = place.parts.clean
    return class_statistics(outputs(place.source, world.x[clean]).features, world.y[clean])
