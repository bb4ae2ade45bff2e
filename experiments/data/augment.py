"""Turn uint8 images on the device into the network's input, inside the compiled step."""

import functools

import jax
import jax.numpy as jnp

from .specs import Dataset


def preprocess(dataset: Dataset):
    """Return a data set's ``(x, keys) -> x`` for `kd2m_jax.fit`: crop, flip, normalise.

    Each image has its own key, so its augmentation does not depend on the number of devices.
    Without keys (evaluation) images are only normalised.
    """
    moments = [tuple(float(v) for v in values) for values in (dataset.mean, dataset.std)]
    # Numbers and no arrays, so that `fit` can share programs between runs.
    return functools.partial(_prepare, *moments, dataset.crop_padding, dataset.flip)


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
