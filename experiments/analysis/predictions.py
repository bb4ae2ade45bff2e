"""What a trained network says of picture files."""

from collections.abc import Iterator, Sequence

import numpy as np

from kd2m_jax import predict

from ..common.errors import DataError, UsageError
from ..data.pictures import read
from .trained import Trained


def predictions(one: Trained, paths: Sequence[str]) -> Iterator[str]:
    """Give a line for each picture: path, probability, class.

    Raises:
      UsageError: no pictures, or images of another form than pictures are read to.
      DataError: at the end, for pictures that cannot be read.
    """
    height, width, channels = one.shape
    if one.config.dataset == "digits":  # a picture's 255 would be read as sixteen times its 16
        raise UsageError("the run's images have values from 0 to 16: it takes no pictures")
    if height != width:
        raise UsageError(f"the run's images are {height}x{width}, and pictures are read as squares")
    if not paths:
        raise UsageError("no picture is named: give one or more files behind the flags")
    network, failed = one.network, []
    for start in range(0, len(paths), 100):
        images, names = [], []
        for path in paths[start : start + 100]:
            try:
                image = read(path, height)
            except IsADirectoryError:
                failed.append(f"  {path} (a folder: name the pictures in it)")
                continue
            except Exception as error:  # Pillow's are of many kinds
                failed.append(f"  {path} ({type(error).__name__}: {error})")
                continue
            images.append(image if channels == 3 else image.mean(2, keepdims=True).astype(np.uint8))
            names.append(path)
        if not names:
            continue
        logits = np.asarray(predict(network, np.stack(images)), np.float64)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        for name, row in zip(names, p, strict=True):
            yield f"{name}  {100 * row.max():.1f}%  {one.classes[int(row.argmax())]}"
    if failed:
        raise DataError("\n".join(["some pictures cannot be read:", *failed]))
