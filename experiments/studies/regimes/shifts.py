"""Domains of the same classes in which images look otherwise."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage


def shift(images: np.ndarray, name: str, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Return images ``[n, height, width, channels]`` of 0 to 255 as the domain shows them.

    Args:
      images: uint8, or smaller values of any type with their maximum as white.
      name: "rotation" by 30 degrees; "noise", normal with half of white as standard deviation;
        "translation" by a fourteenth of the width, down and right, with what leaves on one side
        entering on the other; "blur", a Gaussian of a twentieth of the width.
      seed: of the noise.
    """
    white, width = float(images.max()), images.shape[2]
    x = images.astype(np.float32)
    kind = name.removesuffix("-unequal")
    if kind == "rotation":
        x = ndimage.rotate(x, 30, axes=(1, 2), reshape=False, order=1)
    elif kind == "noise":
        x += 0.5 * white * np.random.default_rng(seed).standard_normal(x.shape, np.float32)
    elif kind == "translation":
        by = max(1, round(width / 14))
        x = np.roll(x, (by, by), (1, 2))
    elif kind == "blur":
        x = ndimage.gaussian_filter(x, (0, width / 20, width / 20, 0))
    else:
        raise ValueError(f"there is no shift {name!r}")
    return np.clip(np.rint(x), 0, white).astype(images.dtype)
