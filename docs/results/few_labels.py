"""Write few_labels.json: MNIST with 100 labels, alone and with the other images for the distance.

    python docs/results/few_labels.py --data-dir=FOLDER

Lambda is chosen on 10,000 training images that nobody trains on, with one seed beside the five.
"""

import argparse
import json
import pathlib

import numpy as np
from flax import nnx
from scipy import stats

from experiments.data.load import load
from kd2m_jax import fit, models, predict

SEEDS, LAMBDAS = range(5), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def main() -> None:
    """Choose lambda, train five pairs, write what they reach."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data-dir")
    data = load("mnist", parser.parse_args().data_dir)
    (x, y), test = (
        (images / np.float32(255), labels) for images, labels in (data.train, data.test)
    )
    x, y, held_out = x[:50_000], y[:50_000], (x[50_000:], y[50_000:])
    teacher = fit(
        models.MLP((512, 128), 10, in_features=784, rngs=nnx.Rngs(0)), (x, y), epochs=10
    ).student

    def trained(seed, coef):
        rng = np.random.default_rng(seed)
        few = np.concatenate([rng.choice(np.flatnonzero(y == c), 10, False) for c in range(10)])
        student = models.MLP((128, 128), 10, in_features=784, rngs=nnx.Rngs(seed + 1))
        options = {"epochs": 1000, "batch_size": 50, "log_every": 100, "seed": seed}
        if coef:
            options |= {"teacher": teacher, "transfer": x, "metric": "cw2", "coef": coef}
        return fit(student, (x[few], y[few]), **options).student

    def accuracy(model, data):
        return float(np.mean(predict(model, data[0]).argmax(1) == data[1]))

    tried = {coef: accuracy(trained(100, coef), held_out) for coef in LAMBDAS}
    best = max(tried, key=tried.__getitem__)
    found = {
        "teacher": accuracy(teacher, test),
        "held out, by lambda": tried,
        "lambda": best,
        "alone": [accuracy(trained(seed, 0), test) for seed in SEEDS],
        "with a transfer set": [accuracy(trained(seed, best), test) for seed in SEEDS],
    }
    gain = np.subtract(found["with a transfer set"], found["alone"])
    half = stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5
    found["gain, 95% interval"] = [gain.mean() - half, gain.mean(), gain.mean() + half]
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
