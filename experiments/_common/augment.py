"""From uint8 images on the device to the network's input, inside the compiled step."""

import jax
import jax.numpy as jnp

from experiments._common.data import Dataset


def preprocess(dataset: Dataset):
    """The ``(x, keys) -> x`` of `kd2m_jax.fit` for a data set: crop, flip, normalise.

    Each image has its own key, so what happens to it does not depend on how many devices there
    are. Without keys (evaluation) images are only normalised.
    """
    mean, std = (
        jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (dataset.mean, dataset.std)
    )

    def augment(image, key):
        crop_key, flip_key = jax.random.split(key)
        if pad := dataset.crop_padding:
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            corner = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
            image = jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)
        if dataset.flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    def apply(x, keys):
        if keys is not None and (dataset.crop_padding or dataset.flip):
            x = jax.vmap(augment)(x, keys)
        return (x.astype(jnp.float32) - mean) / std

    return apply
