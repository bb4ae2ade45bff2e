"""The data sets of the experiments, as arrays in memory.

`load("cifar10", data_dir)` reads what tensorflow-datasets keeps on disk, without TensorFlow, and
downloads and prepares it first where it is missing. `load("digits")` needs neither disk nor
network.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm.auto import tqdm


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
      name: a key of `DATASETS`.
      classes: the names of the classes; label i is `classes[i]`.
      train: images uint8 [n, height, width, channels], labels int32 [n].
      test: likewise.
      mean: of the training pixels per channel, in units of the raw uint8 value.
      std: likewise.
      crop_padding: augment by a random crop after padding by this many pixels; 0: no crop.
      flip: augment by a random horizontal flip.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool


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
    # Not measured here: what much published CIFAR-100 code has, 0.50707516, 0.48654887, 0.44091784
    # and 0.26733429, 0.25643846, 0.27615047, times 255.
    "cifar100": Spec(
        "cifar100",
        "experiments.cifar --dataset=cifar100",
        mean=(129.304, 124.070, 112.434),
        std=(68.170, 65.392, 70.418),
        crop_padding=4,
        flip=True,
    ),
    # Likewise, of the training split without "extra": 0.4376821, 0.4437697, 0.47280442 and
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


class DataError(RuntimeError):
    """A data set that cannot be had or cannot be trusted; the message says what to do."""


def load(name: str, data_dir: str | os.PathLike | None = None, *, progress: bool = True) -> Dataset:
    """Returns a data set as arrays, downloaded and prepared first if it is not on disk.

    Args:
      name: a key of `DATASETS`.
      data_dir: the folder of tensorflow-datasets; None: `$TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`. An archive in its `downloads/manual` is not downloaded.
      progress: show progress bars.

    Raises:
      ValueError: for an unknown name.
      DataError: if the data is not there and cannot be downloaded, or is damaged.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS) or list(DATASETS)
        raise ValueError(f"unknown data set {name!r}: did you mean {' or '.join(near)}?")
    spec = DATASETS[name]
    if name == "digits":
        classes, train, test = _digits()
    else:
        classes, train, test = _prepared(spec, data_dir, progress)
    return Dataset(name, classes, train, test, spec.mean, spec.std, spec.crop_padding, spec.flip)


@contextlib.contextmanager
def reading(path: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Turns any failure inside into a `DataError` that names the file."""
    try:
        yield
    except (DataError, ImportError, MemoryError):  # not the file's fault
        raise
    except Exception as error:
        # Some messages hold a whole example: the beginning, on one line, says what is wrong.
        reason = " ".join(f"{type(error).__name__}: {error}"[:300].split())
        raise DataError(f"{path} cannot be used: {reason}\n{remedy}") from error


def _digits():
    """scikit-learn's 8x8 digits, values 0 to 16: a fixed split, stratified by class."""
    from sklearn.datasets import load_digits  # here: a second to import, for this set alone
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels.astype(np.int32)
    # test: 450 of 1,797; seed 0
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels
    )
    return tuple("0123456789"), (images[train], labels[train]), (images[test], labels[test])


def _prepared(spec: Spec, data_dir: str | os.PathLike | None, progress: bool):
    """Class names, training and test split of a data set of tensorflow-datasets."""
    import tensorflow_datasets as tfds  # here: digits needs none of it
    from tensorflow_datasets.core import constants

    root = pathlib.Path(data_dir or constants.DATA_DIR).expanduser()
    remedy = (
        "Move it away, or name another folder with --data-dir, and run the same command again: "
        "it is prepared afresh."
    )
    with reading(root / spec.source, remedy):
        builder: Any = tfds.builder(spec.source, data_dir=root)
        if not builder.data_path.exists():
            from experiments._common import _prepare

            _prepare.prepare(spec, root, progress)
            builder = tfds.builder(spec.source, data_dir=root)
    with reading(builder.data_path, remedy):
        if not builder.is_prepared():
            raise FileNotFoundError("dataset_info.json or features.json is missing")
        formats = [file_format.value for file_format in builder.info.available_file_formats()]
        if "array_record" not in formats:
            raise ValueError(f"its format, {', '.join(formats)}, is read by TensorFlow alone")
        classes = tuple(builder.info.features["label"].names)
        return classes, *(_decode(builder, s, remedy, progress) for s in ("train", "test"))


def _decode(builder, split: str, remedy: str, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """One split, in the order on disk, every record of every shard accounted for."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from PIL import Image

    # Decoding with Pillow below is faster than tfds's own.
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split, decoders=decoders, file_format="array_record")
    info, features = builder.info.splits[split], builder.info.features
    images = np.empty((info.num_examples, *features["image"].shape), np.uint8)
    labels = np.empty(info.num_examples, np.int32)
    classes = range(features["label"].num_classes)
    start = 0
    title = f"Reading {builder.name}, {split}"
    with tqdm(desc=title, total=len(labels), unit=" images", disable=not progress) as bar:
        for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
            stop = start + length
            with reading(path, remedy):
                # tfds asks for as many records as dataset_info.json says: a longer file passes.
                if (found := len(ArrayRecordDataSource(os.fspath(path)))) != length:
                    raise ValueError(f"{found} records, expected {length}")
                # Many at a time: one record alone takes longer to ask for than to read.
                for first in range(start, stop, 1000):
                    keys = range(first, min(first + 1000, stop))
                    for i, example in zip(keys, source.__getitems__(keys), strict=True):
                        if example["label"] not in classes:
                            raise ValueError(f"record {i - start} has label {example['label']}")
                        with Image.open(io.BytesIO(example["image"])) as image:
                            images[i] = np.asarray(image).reshape(images.shape[1:])
                        labels[i] = example["label"]
                    bar.update(len(keys))
            start = stop
    return images, labels
