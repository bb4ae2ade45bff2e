"""The parts of a plan: lambda, projectors and class costs."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from experiments import digits
from experiments.common.errors import UsageError
from experiments.data.load import load
from experiments.runs import build
from experiments.runs.configuration import configuration
from experiments.runs.settings import Distillation
from kd2m_jax import losses, models


def network(name):
    return models.build(name, num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))


def test_a_published_decay_is_over_all_epochs():
    settings = Distillation("wkd-l", "published")
    settings = dataclasses.replace(digits.DEFAULTS, distillation=settings)
    data = load("digits")
    config = dataclasses.replace(configuration(settings, data), max_steps=3)
    coef = build.build(config, data).coef
    per_epoch = len(data.train[0]) // 128
    assert config.epochs == 20
    steps = np.array([0, 12.5, 16.25, 20]) * per_epoch  # 150, 195 and 240 of 240, in proportion
    np.testing.assert_allclose([coef(s) for s in steps], [600, 600, 300, 0], rtol=2e-2, atol=1e-3)


def test_both_projectors_are_announced():
    metric = losses.get_metric("l2+wkd-f")
    networks = network("resnet8"), network("resnet8x4")
    _, (first, second) = build.with_projector(*networks, load("digits"), metric)
    assert "64 features to the teacher's 256" in first
    assert "last map to the teacher's 256 channels" in second


def test_a_class_without_two_images_is_a_mistake_of_the_user():
    data = load("digits")
    images, labels = data.train
    kept = np.flatnonzero((labels != 3) | (np.cumsum(labels == 3) == 1))[:600]
    poor = dataclasses.replace(data, train=(images[kept], labels[kept]))
    with pytest.raises(UsageError, match="--metric=wkd-l: CKA needs two rows of each class"):
        build.with_class_cost(losses.get_metric("wkd-l"), network("mlp-8-4"), poor)


def test_wkd_l_is_trained_with_the_teachers_costs():
    data, teacher = load("digits"), network("mlp-16-8")
    metric = build.with_class_cost(losses.get_metric("wkd-l:temperature=4"), teacher, data)
    options = dict(metric.options)
    assert options["temperature"] == 4
    cost = np.asarray(options["class_cost"].array)
    features = teacher(build.preprocess(data)(data.train[0], None)).features
    expected = losses.class_cost_matrix(features, data.train[1], num_classes=10)
    np.testing.assert_allclose(cost, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(cost - (1 - np.eye(10))).max() > 0.1
