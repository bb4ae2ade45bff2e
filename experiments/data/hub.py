"""Pictures of a data set of Hugging Face, where ``datasets`` is installed."""

from typing import Any

import numpy as np

from ..common.errors import DataError, UsageError
from .pictures import Pictures, picture

_TESTS = ("test", "validation", "val")


def hub_pictures(name: str, size: int) -> tuple[tuple[str, ...], Pictures, np.ndarray, np.ndarray]:
    """Return the classes, all pictures unread, their labels, and which are there to test on.

    Raises:
      UsageError: no ``datasets``, or a data set without a split "train", pictures or classes.
      DataError: a data set that cannot be loaded.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("--dataset=hf:NAME needs it: pip install datasets") from error
    try:
        found: Any = datasets.load_dataset(name)
    except Exception as error:  # of many kinds: no network, no such name, a script
        reason = str(error).split("\n")[0][:200]
        raise DataError(f"hf:{name} cannot be loaded: {reason}") from error
    if "train" not in found:
        raise UsageError(f"hf:{name} has no split train: there are {', '.join(found)}")
    splits = ["train", *[split for split in _TESTS if split in found][:1]]
    features = found["train"].features
    images = [k for k, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [k for k, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise UsageError(
            f"hf:{name} needs a column of pictures and one of classes: it has {', '.join(features)}"
        )
    paths = [f"{split}/{i}" for split in splits for i in range(len(found[split]))]
    numbers = np.concatenate([np.array(found[split][labels[0]], np.int32) for split in splits])

    def read(path: str, size: int) -> np.ndarray:
        split, number = path.split("/")
        return picture(found[split][int(number)][images[0]], size)

    is_test = np.arange(len(paths)) >= len(found["train"])
    return tuple(features[labels[0]].names), Pictures(paths, size, read), numbers, is_test
