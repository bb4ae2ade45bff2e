"""Download and prepare data sets in the format of tensorflow-datasets, without TensorFlow.

The official builders know the archives, their checksums and the features, but need TensorFlow to
open an archive and to encode an image. Here NumPy, SciPy and Pillow do these two steps. The stock
`tfds.data_source` reads the files that are written here.
"""

import contextlib
import gzip
import io
import pathlib
import shlex
import shutil
import sys
import tarfile
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import requests
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from kd2m_jax import CheckpointError
from kd2m_jax.internal import locked

from ..common.errors import DataError, command, reading
from .specs import Spec

# Seconds that a server may take to answer before it counts as out of reach.
PATIENCE = 15

Columns = Mapping[str, object]  # feature -> one value per example


def prepare(spec: Spec, root: pathlib.Path, progress: bool) -> None:
    """Download and prepare `spec.source` in the data folder `root`.

    Archives in `root/downloads/manual` are taken from there, archives of an earlier run from
    `root/downloads`. The checksum of each is verified. tfds writes into a folder of another name
    and renames it at the end, so an interruption leaves nothing that looks complete.

    Raises:
      DataError: if an archive cannot be downloaded, or is not what it should be.
    """
    builder = _builder_class(spec.source)(data_dir=root, file_format="array_record")
    # Without the second option tfds asks a server whether it has the prepared data.
    config = tfds.download.DownloadConfig(force_checksums_validation=True, try_download_gcs=False)
    tfds.display_progress_bar(progress)
    # tfds prints what it does: the standard output belongs to the experiment.
    prints = sys.stderr if progress else io.StringIO()
    try:
        # Where several processes begin at once the first one prepares; tfds lets the others pass.
        lock = locked(root / spec.source / ".lock", waiting=print)
        with contextlib.redirect_stdout(prints), lock:
            builder.download_and_prepare(download_config=config)
    except NonMatchingChecksumError as error:
        # Its first line names the address and the file, the rest holds both checksums.
        wrong = str(error).splitlines()[0].rstrip(":")
        raise DataError(f"{wrong}.\nDelete the file and run the same command again.") from error
    except (requests.RequestException, ConnectionError, tfds.download.DownloadError) as error:
        _tidy(root, spec.source)
        raise DataError(_how_to_get(spec, root, error)) from error
    except (OSError, CheckpointError) as error:
        raise DataError(
            f"{spec.source} is not in {root}, and cannot be written there: {error}\n"
            "Name another folder with --data-dir.\n"
            f"To run without it: {command('experiments.digits')}"
        ) from error


def _tidy(root: pathlib.Path, source: str) -> None:
    """Remove what a failed download leaves: halves of archives, a lock, folders with nothing."""
    downloads = root / "downloads"
    for half in downloads.glob(f"{source}/*.tmp.*"):
        shutil.rmtree(half, ignore_errors=True)
    (root / source / ".lock").unlink(missing_ok=True)
    for folder in (downloads / source, downloads / "extracted", downloads, root / source):
        with contextlib.suppress(OSError):  # it is not there, or holds something
            folder.rmdir()


def _how_to_get(spec: Spec, root: pathlib.Path, error: Exception) -> str:
    """Say how to get the data, where there is neither data nor network."""
    manual = root / "downloads" / "manual"
    missing = [name for name in _SOURCES[spec.source][0] if not (manual / name).exists()]
    again = f"{command(spec.experiment)} --data-dir={shlex.quote(str(root))}"
    return (
        f"{spec.source} is not in {root}, and cannot be downloaded ({type(error).__name__}).\n"
        f"To get it, where there is a network: {again} --max-steps=1\n"
        f"or put {', '.join(missing)} into {manual},\n"
        "or name the folder that has it with --data-dir.\n"
        f"To run without it: {command('experiments.digits')}"
    )


def _builder_class(source: str):
    """Return the official builder of a data set, without TensorFlow."""
    official: Any = tfds.builder_cls(source)
    archives, read = _SOURCES[source]

    class Builder(official, skip_registration=True):  # pyright: ignore
        name = source
        url_infos = official.url_infos  # the checksums; not found from this file
        pkg_dir_path = official.pkg_dir_path  # the citation; likewise

        def _split_generators(self, dl_manager):
            urls = {info.filename: url for url, info in self.url_infos.items()}
            paths = dl_manager.download({name: urls[name] for name in archives})
            splits = read(self, [paths[name] for name in archives])
            return {split: self._generate_examples(columns) for split, columns in splits.items()}

        def _generate_examples(self, columns):
            for i, row in enumerate(zip(*columns.values(), strict=True)):
                example = dict(zip(columns, row, strict=True))
                # tfds encodes an array with TensorFlow, but a Pillow image with Pillow.
                image = example["image"]
                example["image"] = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
                yield i, example

    return Builder


def _read_cifar(builder, paths) -> dict[str, Columns]:
    """Read binary rows: one byte per label, then 3x32x32 bytes of image."""
    (path,) = paths
    info = builder._cifar_info
    keys = info.label_keys

    def columns(split, names):
        data = b"".join(files[info.prefix + name] for name in names)
        rows = np.frombuffer(data, np.uint8).reshape(-1, len(keys) + 3 * 32 * 32)
        images = rows[:, len(keys) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = {key: rows[:, i] for i, key in enumerate(keys)}
        return {"id": _ids(split, len(rows), 5), "image": images, **labels}

    with _archive(path), tarfile.open(path) as tar:
        # In one pass: going back in a compressed archive starts over.
        files = {file.name: data.read() for file in tar if (data := tar.extractfile(file))}
        for key, name in zip(keys, info.label_files, strict=True):
            builder.info.features[key].names = files[info.prefix + name].decode().split()
        return {
            "train": columns("train", info.train_files),
            "test": columns("test", info.test_files),
        }


def _read_svhn(builder, paths) -> dict[str, Columns]:
    """Read Matlab files: X [32, 32, 3, n], y [n, 1] with 10 for the digit 0.

    The archive "extra" of the official builder is left out: 1.2 GiB that nothing here reads.
    """
    splits = {}
    for split, path in zip(("train", "test"), paths, strict=True):
        with _archive(path):
            data = scipy.io.loadmat(path)
            images = data["X"].transpose(3, 0, 1, 2)
            labels = data["y"].reshape(len(images)) % 10
            splits[split] = {"id": _ids(split, len(images), 6), "image": images, "label": labels}
    return splits


def _read_mnist(builder, paths) -> dict[str, Columns]:
    """Read compressed idx files: the number of axes in byte 3, their lengths, then the values."""

    def read(path):
        with _archive(path), gzip.open(path) as file:
            data = file.read()
            shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
            return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)

    images, labels, test_images, test_labels = map(read, paths)
    return {
        "train": {"image": images[..., None], "label": labels},
        "test": {"image": test_images[..., None], "label": test_labels},
    }


# Data set -> its archives, and what reads them.
_SOURCES = {
    "cifar10": (("cifar-10-binary.tar.gz",), _read_cifar),
    "cifar100": (("cifar-100-binary.tar.gz",), _read_cifar),
    "svhn_cropped": (("train_32x32.mat", "test_32x32.mat"), _read_svhn),
    "mnist": (
        (
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        ),
        _read_mnist,
    ),
}


def _ids(split: str, count: int, digits: int) -> list[str]:
    return [f"{split}_{i:0{digits}d}" for i in range(count)]


def _archive(path) -> contextlib.AbstractContextManager:
    return reading(path, "Delete the file and run the same command again.")


_tfds_open_url = downloader._open_url


def _open_url(url, **kwargs):
    """Ask a server once, within `PATIENCE`, before tfds downloads from it.

    If a server is out of reach, tfds tries again for minutes. Where a firewall drops the packets
    it waits for the system's own limits, address by address. The first request is made in a thread
    because its time-out holds per address, and not at all for the name's resolution.
    """
    outcome = []

    def ask():
        try:
            with requests.get(url, stream=True, timeout=PATIENCE, **kwargs) as response:
                response.raise_for_status()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not outcome:
        raise ConnectionError(f"{url} did not answer within {PATIENCE} s")
    if outcome[0]:
        raise outcome[0]
    return _tfds_open_url(url, timeout=60, **kwargs)


# For good, not only while `prepare` runs. `prepare` fails with the first failed download; the other
# downloads run in threads that Python waits for at exit, and may not have come this far.
downloader._open_url = _open_url
downloader.MAX_RETRIES = 1
