"""Features in the plane."""

import json
import types

import numpy as np
import pytest
from flax import nnx

from experiments.analysis import features as embeddings
from experiments.analysis.finished import Finished
from experiments.common.errors import UsageError
from experiments.data.specs import Dataset
from experiments.runs.folder import RunFolder
from kd2m_jax import models


@pytest.mark.slow
def test_features_take_so_many_examples_of_ten_classes(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (90, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(90) % 30  # of 30 classes, a third of each 30 images
    classes = tuple(map(str, range(30)))
    data = Dataset("x", classes, (images, labels), (images, labels), (127.0,), (60.0,), 0, False)

    def network(seed, width=4):
        widths, rngs = (8, width), nnx.Rngs(seed)
        return models.MLP(widths, 30, in_features=16, rngs=rngs)

    trained = {k: network(i) for i, k in enumerate(("teacher", "student", "distilled"))}
    run = Finished(RunFolder(tmp_path), types.SimpleNamespace(dataset=data), trained)
    embeddings.write(run, examples=25, seed=0)
    assert json.loads((tmp_path / "features.json").read_text())["examples"] == 25
    with pytest.raises(UsageError, match="as resnet20 and resnet8 do"):
        embeddings.write(run._replace(trained=trained | {"student": network(3, 5)}), 25, 0)
