"""Crop, flip and normalisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.augment import preprocess
from experiments.data.specs import DATASETS, Dataset

KEYS = jax.random.split(jax.random.key(0), 2000)


def dataset(name, images):
    spec = DATASETS[name]
    split = (images, np.zeros(len(images), np.int32))
    return Dataset(name, ("a",), split, split, spec.mean, spec.std, spec.crop_padding, spec.flip)


def undone(name, x, keys):
    """Pixels after augmentation, before normalisation."""
    of = dataset(name, x)
    out = preprocess(of)(jnp.asarray(x), keys)
    return np.rint(np.asarray(out) * np.array(of.std) + np.array(of.mean)).astype(int)


def marked(n):
    """Images whose one bright pixel tells where the crop was taken and whether it was flipped."""
    x = np.zeros((n, 32, 32, 3), np.uint8)
    x[:, 15, 5, 0] = 200
    return x


@pytest.mark.parametrize(
    ("name", "flips"), [("cifar10", True), ("cifar100", True), ("svhn", False)]
)
def test_crops_are_of_all_offsets_and_flips_of_the_sets_that_have_them(name, flips):
    out = undone(name, marked(len(KEYS)), KEYS)
    at = [tuple(np.argwhere(image[..., 0] == 200)[0]) for image in out]
    rows = {row for row, _ in at}
    assert rows == set(range(15 - 4, 15 + 5))
    straight, flipped = set(range(1, 10)), set(range(22, 31))
    assert {column for _, column in at} == (straight | flipped if flips else straight)
    share = np.mean([column in flipped for _, column in at])
    assert abs(share - 0.5 * flips) < 0.05  # 4 standard errors of 2,000 draws
    # Uniform: each of the 9 offsets a ninth of the time.
    counts = np.bincount([row - 11 for row, _ in at], minlength=9) / len(at)
    assert np.abs(counts - 1 / 9).max() < 0.03
    assert out.min() >= 0  # what is padded is black before normalisation


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_digits_are_left_as_they_are(name):
    x = np.random.default_rng(0).integers(0, 17, (8, 8, 8, 1)).astype(np.uint8)
    np.testing.assert_array_equal(undone(name, x, KEYS[:8]), x)


def test_evaluation_normalises_and_nothing_else():
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(undone("cifar10", x, None), x)
    of = dataclasses.replace(dataset("cifar10", x), mean=(0.0, 10.0, 20.0), std=(1.0, 2.0, 4.0))
    np.testing.assert_allclose(
        preprocess(of)(jnp.asarray(x), None)[0, 0, 0],
        [x[0, 0, 0, 0], (x[0, 0, 0, 1] - 10.0) / 2, (x[0, 0, 0, 2] - 20.0) / 4],
        rtol=1e-6,
    )
