"""Turn uint8 images on the device into the network's input, inside the compiled step."""

import jax
import jax.numpy as jnp

from experiments.data.specs import Dataset


def preprocess(dataset: Dataset):
    """Return a data set's ``(x, keys) -> x`` for `kd2m_jax.fit`: crop, flip, normalise.

    Each image has its own key, so its augmentation does not depend on the number of devices.
    Without keys (evaluation) images are only normalised.
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
