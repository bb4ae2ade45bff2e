"""What is known of each data set, and what one in memory looks like."""

import dataclasses
import hashlib
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
      name: a key of `DATASETS`, or "images".
      classes: the names of the classes; label i is `classes[i]`.
      train: images uint8 [n, height, width, channels] (or `pictures.Pictures`, which are read when
        they are asked for), labels int32 [n].
      test: likewise.
      mean: the mean of the training pixels per channel, in units of the raw uint8 value.
      std: their standard deviation, likewise.
      crop_padding: augment by a random crop after padding by this many pixels; 0: no crop.
      flip: augment by a random horizontal flip.
      transfer: images without labels, for the distance alone, or None.
      digest: a hash of all images and labels, where it is known; else they are hashed.
      origin: where images of one's own come from, to read them again; else None.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Any, np.ndarray]
    test: tuple[Any, np.ndarray]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    transfer: Any = None
    digest: str | None = None
    origin: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read.

    Attributes:
      source: its name in tensorflow-datasets.
      experiment: the arguments of `python -m` that run on it.
      mean, std, crop_padding, flip: as in `Dataset`.
    """

    source: str
    experiment: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False


DATASETS = {
    "cifar10": Spec(
        "cifar10",
        "experiments.cifar --dataset=cifar10",
        mean=(125.307, 122.950, 113.865),  # measured
        std=(62.993, 62.089, 66.705),
        crop_padding=4,
        flip=True,
    ),
    # Not measured here: much published CIFAR-100 code has 0.50707516, 0.48654887, 0.44091784 and
    # 0.26733429, 0.25643846, 0.27615047; times 255.
    "cifar100": Spec(
        "cifar100",
        "experiments.cifar --dataset=cifar100",
        mean=(129.304, 124.070, 112.434),
        std=(68.170, 65.392, 70.418),
        crop_padding=4,
        flip=True,
    ),
    # Likewise, for the training split without "extra": 0.4376821, 0.4437697, 0.47280442 and
    # 0.19803012, 0.20101562, 0.19703614, times 255. No flip: a mirrored digit is no digit.
    "svhn": Spec(
        "svhn_cropped",
        "experiments.svhn",
        mean=(111.609, 113.161, 120.565),
        std=(50.498, 51.259, 50.244),
        crop_padding=4,
    ),
    "mnist": Spec("mnist", "experiments.mnist", mean=(33.318,), std=(78.567,)),  # measured
    "digits": Spec("", "experiments.digits", mean=(4.884,), std=(6.016,)),  # measured
}


def shortened(dataset: Dataset, examples: int) -> Dataset:
    """Return the data set with the first so many of its training images."""
    images, labels = dataset.train
    return dataclasses.replace(dataset, train=(images[:examples], labels[:examples]))


def data_sha256(dataset: Dataset) -> str:
    """Hash all images and labels, for training and for testing."""
    if dataset.digest is not None:
        return dataset.digest
    return sha256(*(array.tobytes() for array in (*dataset.train, *dataset.test)))


def sha256(*parts: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of all parts together."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
