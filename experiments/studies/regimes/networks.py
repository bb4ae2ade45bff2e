"""The networks of the study, small enough for a CPU, and the teacher that all students share."""

import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kd2m_jax import Outputs, fit, models, outputs
from kd2m_jax.internal import layer_list

from ...data.augment import preprocess
from ...data.specs import Dataset
from .splits import held_out
from .study import Study

TEACHER_SEED = 1_000


class ConvNet(nnx.Module):
    """Convolutions of stride 2 with BatchNorm, a hidden layer of features, a linear head."""

    def __init__(self, filters, features, num_classes, *, shape, rngs: nnx.Rngs):
        height, width, channels = shape
        sizes = [channels, *filters]
        self.convs = layer_list(
            nnx.Conv(a, b, (3, 3), strides=2, use_bias=False, rngs=rngs)
            for a, b in itertools.pairwise(sizes)
        )
        self.norms = layer_list(nnx.BatchNorm(size, momentum=0.9, rngs=rngs) for size in filters)
        for _ in filters:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.hidden = nnx.Linear(height * width * filters[-1], features, rngs=rngs)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> Outputs:
        """Map ``[n, height, width, channels]`` images to features and logits."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        features = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return Outputs(features, self.head(features))


class Coarse(nnx.Module):
    """A network that sees images averaged over squares of pixels: fewer weights in its first layer.

    Args:
      network: maps ``[n, height, width, channels]`` of the coarse images.
      factor: the width of a square.
    """

    def __init__(self, network: nnx.Module, factor: int):
        self.network, self.factor = network, factor

    def __call__(self, x: jax.Array) -> Outputs:
        """Map ``[n, height, width, channels]`` images to features and logits."""
        n, height, width, channels = x.shape
        k = self.factor
        x = x.reshape(n, height // k, k, width // k, k, channels)
        return self.network(jnp.mean(x, axis=(2, 4)))


class World(NamedTuple):
    """A data set as networks see it, and the teacher's outputs for its training images.

    Attributes:
      dataset: the images.
      x: training images, normalised.
      y: their labels.
      test_x: test images, likewise.
      test_y: their labels.
      teacher: the trained network.
      seen: its outputs for x.
      seen_untrained: those of the same network without training.
    """

    dataset: Dataset
    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    teacher: nnx.Module
    seen: Outputs
    seen_untrained: Outputs


def world(dataset: Dataset, study: Study, folder: pathlib.Path) -> World:
    """Normalise a data set and train its teacher, or restore it from the folder."""
    normalised = as_seen(dataset)
    x, test_x = normalised(dataset.train[0]), normalised(dataset.test[0])
    y, test_y = (np.asarray(labels, np.int32) for labels in (dataset.train[1], dataset.test[1]))
    untrained = network(dataset, study)
    pool, _ = held_out(study, len(y))
    steps = study.teacher_epochs * (len(pool) // 128)
    teacher = fit(
        untrained,
        (x[pool], y[pool]),
        epochs=study.teacher_epochs,
        optimizer=optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2),
        seed=TEACHER_SEED,
        checkpoint_dir=folder / "teacher",
    ).student
    untrained.eval()
    return World(dataset, x, y, test_x, test_y, teacher, outputs(teacher, x), outputs(untrained, x))


def as_seen(dataset: Dataset):
    """Return the function that normalises images, without augmentation, a part at a time."""
    prepare = jax.jit(functools.partial(preprocess(dataset), keys=None))

    def normalised(images: np.ndarray) -> np.ndarray:
        parts = np.array_split(images, max(1, len(images) // 1000))
        return np.concatenate([np.asarray(prepare(part)) for part in parts])

    return normalised


def network(dataset: Dataset, study: Study, *, seed: int = TEACHER_SEED) -> ConvNet:
    """Make an untrained network of the teacher's kind."""
    return ConvNet(
        study.filters,
        study.student[-1],
        len(dataset.classes),
        shape=dataset.train[0].shape[1:],
        rngs=nnx.Rngs(seed),
    )


def student(dataset: Dataset, study: Study, seed: int) -> nnx.Module:
    """Make a student; its seed is not the teacher's."""
    shape, classes, rngs = dataset.train[0].shape[1:], len(dataset.classes), nnx.Rngs(seed)
    if study.student_filters:
        return ConvNet(study.student_filters, study.student[-1], classes, shape=shape, rngs=rngs)
    inputs = int(np.prod(shape)) // study.coarse**2
    mlp = models.MLP(study.student, classes, in_features=inputs, rngs=rngs)
    return mlp if study.coarse == 1 else Coarse(mlp, study.coarse)
