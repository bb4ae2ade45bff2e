"""Turn uint8 images on the device into the network's input, inside the compiled step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .specs import Dataset


def preprocess(
    dataset: Dataset, *, label_smoothing: float = 0.0, mixup: float = 0.0
) -> Callable[..., Any]:
    """Return a data set's ``(x, keys) -> x`` for `kd2m_jax.fit`: crop, flip, normalise.

    Each image has its own key, so its augmentation does not depend on the number of devices.
    Without keys (evaluation) images are only normalised. With one of the options it is ``(x,
    labels, keys) -> (x, labels)`` and the labels become distributions.
    """
    moments = [tuple(float(v) for v in values) for values in (dataset.mean, dataset.std)]
    # Numbers and no arrays, so that `fit` can share programs between runs.
    images = functools.partial(_prepare, *moments, dataset.crop_padding, dataset.flip)
    if not (label_smoothing or mixup):
        return images
    return _Softened(images, len(dataset.classes), label_smoothing, mixup)


@dataclasses.dataclass(frozen=True)
class _Softened:
    """Images prepared, labels smoothed, both mixed in pairs (mixup, Zhang et al., ICLR 2018)."""

    images: Callable
    classes: int
    smoothing: float
    alpha: float

    def __call__(self, x, labels, keys):
        x = self.images(x, keys)
        if keys is None:
            return x, labels
        soft = jax.nn.one_hot(labels, self.classes)
        soft = (1 - self.smoothing) * soft + self.smoothing / self.classes
        if self.alpha:
            # Images of one device's part of the batch, in pairs with their neighbours: the batch
            # is in random order already.
            share = jax.random.beta(jax.random.fold_in(keys[0], 1), self.alpha, self.alpha)
            mix = lambda a: share * a + (1 - share) * jnp.roll(a, 1, axis=0)  # noqa: E731
            x, soft = mix(x), mix(soft)
        return x, soft


def _prepare(mean: tuple, std: tuple, crop_padding: int, flip: bool, x, keys):
    if keys is not None and (crop_padding or flip):
        x = jax.vmap(functools.partial(_augmented, crop_padding, flip))(x, keys)
    shift, scale = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (x.astype(jnp.float32) - shift) / scale


def _augmented(crop_padding: int, flip: bool, image: jax.Array, key: jax.Array) -> jax.Array:
    crop_key, flip_key = jax.random.split(key)
    if pad := crop_padding:
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        corner = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        image = jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)
    if flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    return image
