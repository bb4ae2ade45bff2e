"""Pictures of any kind and size, read to arrays of one size when they are asked for."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..common.errors import DataError
from .specs import sha256

_AT_ONCE = 512  # pictures that the threads are given at a time


class Pictures:
    """Pictures as an array ``[n, size, size, 3]`` uint8 that is read where it is indexed.

    Args:
      paths: the files, or other names of pictures.
      size: height and width: the shorter side is scaled to it, the middle is cut out.
      reads: ``(path, size) -> [size, size, 3]``; by default it reads files.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, paths: Sequence[str], size: int, reads: Callable[[str, int], np.ndarray] | None = None
    ):
        self.paths, self.size, self.reads = np.asarray(paths, object), size, reads or read

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that these are."""
        return (len(self.paths), self.size, self.size, 3)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        """Read one picture, or those of a slice or of row numbers."""
        if isinstance(index, int | np.integer):
            try:
                return self.reads(self.paths[index], self.size)
            except Exception as error:  # it could be read when the run began
                raise DataError(f"{self.paths[index]} cannot be read: {error}") from error
        return np.stack([self[i] for i in np.arange(len(self))[index]])

    def only(self, rows: Any) -> "Pictures":
        """Return some of them, unread."""
        return Pictures(self.paths[rows].tolist(), self.size, self.reads)


def read(path: Any, size: int) -> np.ndarray:
    """Read a file as ``[size, size, 3]`` uint8; any error of Pillow's for one that is damaged.

    Turned as its EXIF data says, one frame of several, transparent parts white, grey as colour.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which does not matter here
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG of many pixels is read faster
            return picture(image, size)


def picture(image: Any, size: int) -> np.ndarray:
    """Bring a picture of Pillow's into the form of all."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which convert() would cut off
        values = np.asarray(image, np.float64)
        top = 65535 if values.max() > 255 else 255
        image = Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted)


class Seen(NamedTuple):
    """What one pass over pictures found.

    Attributes:
      images: all of them ``[n, size, size, 3]``, or None where they are not kept.
      errors: what is wrong with each that cannot be read, by its number.
      sums: ``[n, 2, 3]``, each one's mean value per channel, and mean square.
      digests: a hash of each.
    """

    images: np.ndarray | None
    errors: dict[int, str]
    sums: np.ndarray
    digests: list[str]


def look(pictures: Pictures, *, keep: bool, title: str, progress: bool) -> Seen:
    """Read every picture once, in threads: what cannot be read shows before the first step."""
    from tqdm.auto import tqdm

    n = len(pictures)
    images = np.zeros(pictures.shape, np.uint8) if keep else None
    errors: dict[int, str] = {}
    sums, digests = np.zeros((n, 2, 3)), [""] * n
    bar = tqdm(desc=title, total=n, unit=" pictures", disable=not progress)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, found in enumerate(_all(pool, pictures)):
            bar.update()
            if isinstance(found, Exception):
                errors[i] = f"{type(found).__name__}: {found}"
                continue
            if images is not None:
                images[i] = found
            values = found.reshape(-1, 3).astype(np.float64)
            sums[i] = values.mean(0), (values**2).mean(0)
            digests[i] = sha256(found.tobytes())
    return Seen(images, errors, sums, digests)


def _all(pool: ThreadPoolExecutor, pictures: Pictures) -> Iterator[Any]:
    def one(path):
        try:
            return pictures.reads(path, pictures.size)
        except Exception as error:  # Pillow's are of many kinds
            return error

    for start in range(0, len(pictures), _AT_ONCE):  # all at once would be as many futures
        yield from pool.map(one, pictures.paths[start : start + _AT_ONCE])


class _Pairs:
    """A random-access source for grain."""

    def __init__(self, images: Pictures, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images[index], self.labels[index]


def for_fit(examples: tuple[Any, Any], batch_size: int, seed: int | None) -> Any:
    """Return what `kd2m_jax.fit` takes: arrays, or batches of pictures that are read in threads.

    With a seed they are shuffled, anew each epoch, and the incomplete last batch is left out.
    """
    images, labels = examples
    if not isinstance(images, Pictures):
        return examples
    import grain

    data = grain.MapDataset.source(_Pairs(images, labels))
    if seed is not None:
        data = data.shuffle(seed=seed)
    return data.batch(batch_size, drop_remainder=seed is not None)
