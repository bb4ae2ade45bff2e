"""Read a data set into memory.

`load("cifar10", data_dir)` reads the files of tensorflow-datasets without TensorFlow. Where they
are missing it downloads and prepares them first. `load("digits")` needs no network, and no disk.
"""

import contextlib
import importlib.metadata
import io
import os
import pathlib
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kd2m_jax.internal import is_address

from ..common.errors import reading
from .array_cache import cached, kept
from .specs import DATASETS, Dataset, Spec


def load(name: str, data_dir: str | os.PathLike | None = None, *, progress: bool = True) -> Dataset:
    """Return a data set as arrays; download and prepare it first if it is not on disk.

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
        from kd2m_jax.internal import did_you_mean  # loads JAX

        raise ValueError(f"unknown data set {name!r}: {did_you_mean(name, DATASETS)}")
    spec = DATASETS[name]
    if name == "digits":
        classes, train, test = _digits()
    else:
        classes, train, test = _prepared(spec, data_dir, progress)
    return Dataset(name, classes, train, test, spec.mean, spec.std, spec.crop_padding, spec.flip)


def _digits():
    """Return scikit-learn's digits, from beside the compiled programs if a run has left them."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false")
    if off or not folder or is_address(folder):
        arrays = _split_digits()
    else:
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        # The last number is that of `_split_digits`: another one for any change to it.
        source = f"scikit-learn {importlib.metadata.version('scikit-learn')}, split 1"
        arrays = kept(pathlib.Path(folder) / "digits.npz", lambda: source, _split_digits)
    x, labels, test_x, test_labels = arrays
    return tuple("0123456789"), (x, labels), (test_x, test_labels)


def _split_digits() -> list[np.ndarray]:
    """Split the 8x8 images, values 0 to 16: always the same, stratified by class."""
    # Imported here because it takes two seconds, and scipy.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels.astype(np.int32)
    # test: 450 of 1,797; seed 0
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels
    )
    return [images[train], labels[train], images[test], labels[test]]


def _prepared(spec: Spec, data_dir: str | os.PathLike | None, progress: bool):
    """Return class names, training and test split of a data set of tensorflow-datasets."""
    import tensorflow_datasets as tfds  # imported here because digits does not need it
    from tensorflow_datasets.core import constants

    root = pathlib.Path(data_dir or constants.DATA_DIR).expanduser()
    remedy = (
        "Move it away, or name another folder with --data-dir, and run the same command again: "
        "it is prepared afresh."
    )
    with reading(root / spec.source, remedy):
        builder: Any = tfds.builder(spec.source, data_dir=root)
        if not builder.data_path.exists():
            from .prepare import prepare

            prepare(spec, root, progress)
            builder = tfds.builder(spec.source, data_dir=root)
    with reading(builder.data_path, remedy):
        if not builder.is_prepared():
            raise FileNotFoundError("dataset_info.json or features.json is missing")
        formats = [file_format.value for file_format in builder.info.available_file_formats()]
        if "array_record" not in formats:
            raise ValueError(f"its format, {', '.join(formats)}, is read by TensorFlow alone")
        classes = tuple(builder.info.features["label"].names)

        def decode():
            return [a for s in ("train", "test") for a in _decode(builder, s, remedy, progress)]

        x, labels, test_x, test_labels = cached(pathlib.Path(builder.data_path), decode)
        return classes, (x, labels), (test_x, test_labels)


def decoded(encoded: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decode a PNG of the declared shape; ValueError, before it is decoded, for any other image."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=["PNG"]) as image:
        height, width, channels = shape
        found = (image.height, image.width, image.mode)
        declared = (height, width, {1: "L", 3: "RGB"}[channels])
        if found != declared:
            raise ValueError(f"an image is {found}, and the data set's are {declared}")
        return np.asarray(image).reshape(shape)


def _decode(builder, split: str, remedy: str, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read one split in the order on disk, and check that no record of any shard is missing."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

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
                # Many at a time, because asking for one record takes longer than reading it.
                for first in range(start, stop, 1000):
                    keys = range(first, min(first + 1000, stop))
                    for i, example in zip(keys, source.__getitems__(keys), strict=True):
                        if example["label"] not in classes:
                            raise ValueError(f"record {i - start} has label {example['label']}")
                        images[i] = decoded(example["image"], images.shape[1:])
                        labels[i] = example["label"]
                    bar.update(len(keys))
            start = stop
    return images, labels
