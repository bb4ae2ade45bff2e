"""Write shifted_domain.json: MNIST turned by 30 degrees, without labels, without the teacher.

    python docs/results/shifted_domain.py --data-dir=FOLDER

A network that was trained on upright digits goes on with turned ones. What is left of the upright
ones are its features (a bank) or the means and covariances of its classes.
"""

import argparse
import json
import pathlib

import numpy as np
import scipy.ndimage
from flax import nnx

from experiments.data.load import load
from kd2m_jax import Bank, class_statistics, fit, models, outputs, predict

SEEDS = range(5)


def main() -> None:
    """Train, adapt and test five networks, write what they reach."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data-dir")
    data = load("mnist", parser.parse_args().data_dir)
    (x, y), (test_x, test_y) = ((a / np.float32(255), b) for a, b in (data.train, data.test))
    turned, test_turned = (
        scipy.ndimage.rotate(a, 30, axes=(1, 2), reshape=False, order=1) for a in (x, test_x)
    )
    found = {"upright": [], "turned": [], "from a bank": [], "from statistics": []}
    for seed in SEEDS:
        network = models.MLP((512, 128), 10, in_features=784, rngs=nnx.Rngs(seed))
        source = fit(network, (x, y), epochs=5, seed=seed).student

        seen = outputs(source, x)
        bank = Bank(seen.features, labels=y, rows=None)
        statistics = class_statistics(seen.features, y)
        options = {"task_coef": 0, "epochs": 5, "batch_size": 256, "seed": seed}
        from_bank = fit(source, (turned, None), teacher=bank, metric="w2", **options).student
        from_statistics = fit(
            source, (turned, None), teacher=statistics, metric="gaussian-cw2", **options
        ).student

        tested = {
            "upright": (source, test_x),
            "turned": (source, test_turned),
            "from a bank": (from_bank, test_turned),
            "from statistics": (from_statistics, test_turned),
        }
        for name, (model, images) in tested.items():
            found[name].append(float(np.mean(predict(model, images).argmax(1) == test_y)))
        print(seed, {name: values[-1] for name, values in found.items()}, flush=True)
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
