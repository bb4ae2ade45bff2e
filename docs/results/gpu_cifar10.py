"""Train what gpu_cifar10.json shows: ResNet-34 to ResNet-18, 1,000 and all labels of CIFAR-10.

    timeout 15m python docs/results/gpu_cifar10.py --data-dir=FOLDER

For one GPU, where it trains 24 students. Stopped, the same command goes on after the last row:
--out has the numbers and the teacher. Lambda is "auto:1", so that no labels choose it. With 1,000
labels the distance sees the images without labels. --smoke trains small networks on random images,
on any machine.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.bench.gpu import random_images
from experiments.common import machine
from experiments.data.augment import preprocess
from experiments.data.load import load
from experiments.data.specs import Dataset
from experiments.studies import intervals
from kd2m_jax import fit, models, predict

SEEDS, LABELS, BATCH = range(3), (1_000, 50_000), 128
ROWS = (None, "kd", "cw2", "procrustes")
PAIR, STEPS, EPOCHS = ("resnet34", "resnet18"), 2_500, 15
SMOKE_PAIR, SMOKE_STEPS = ("mlp-16-8", "mlp-16-8"), 3


def main() -> None:
    """Train the teacher and every row's students that the file lacks, write what they reach."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--out", default="runs/gpu_cifar10", help="folder")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    dataset = random_images(1_200) if given.smoke else load("cifar10", given.data_dir)
    pair, steps = (SMOKE_PAIR, SMOKE_STEPS) if given.smoke else (PAIR, STEPS)
    folder = pathlib.Path(given.out + "-smoke" * given.smoke)
    x, y = dataset.train
    teacher = fit(
        network(pair[0], 100),
        (x, y),
        checkpoint_dir=folder / "teacher",
        **options(dataset, steps if given.smoke else EPOCHS * (len(y) // BATCH)),
    ).student
    found = {
        "device": jax.devices()[0].device_kind,
        "versions": machine.versions(("jax", "flax", "optax", "kd2m-jax")),
        "steps": steps,
        "teacher": accuracy(teacher, dataset),
    }
    out = folder / "gpu_cifar10.json"
    earlier = json.loads(out.read_text()) if out.exists() else {"rows": {}} | found
    if (earlier["steps"], earlier["teacher"]) != (steps, found["teacher"]):
        sys.exit(f"error: {out} is of another teacher or length: name another --out, or delete it")
    for labels in LABELS:
        table = earlier["rows"].setdefault(str(labels), {})
        for row in ROWS:
            if (row or "none") in table:
                continue
            start = time.perf_counter()
            scores = trained(dataset, pair[1], row, labels, teacher, steps)
            table[row or "none"] = (
                {"values": scores}
                | intervals.paired(scores, table.get("none", {"values": scores})["values"])
                | {"seconds": round(time.perf_counter() - start, 1)}
            )
            print(labels, row, table[row or "none"], flush=True)
            out.write_text(json.dumps(earlier, indent=1) + "\n")


def trained(
    dataset: Dataset, name: str, row: str | None, labels: int, teacher: nnx.Module, steps: int
) -> list[float]:
    """Train a row's students, one per seed, in one program; return their accuracies."""
    x, y = dataset.train
    few = np.random.default_rng(0).permutation(len(y))[:labels]
    students = [network(name, seed) for seed in SEEDS]
    distilled = {"teacher": teacher, "metric": row, "coef": "auto:1"} if row else {}
    if row and labels < len(y):
        distilled["transfer"] = x[np.setdiff1d(np.arange(len(y)), few)]
    results = fit(students, (x[few], y[few]), **distilled, **options(dataset, steps))
    return [accuracy(one.student, dataset) for one in results]


def network(name: str, seed: int) -> nnx.Module:
    """Make a network in bfloat16."""
    rngs = nnx.Rngs(seed)
    return models.build(
        name, num_classes=10, image_shape=(32, 32, 3), rngs=rngs, dtype=jnp.bfloat16
    )


def options(dataset: Dataset, steps: int) -> dict:
    """Return the options of `fit` that all networks share."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, min(200, steps // 2), steps)
    return {
        "optimizer": optax.chain(
            optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9, nesterov=True)
        ),
        "preprocess": preprocess(dataset),
        "epochs": steps,
        "max_steps": steps,
        "batch_size": BATCH,
        "transfer_batch_size": BATCH,
        "log_every": steps,
    }


def accuracy(model: nnx.Module, dataset: Dataset) -> float:
    """Return the accuracy on the test images, in percent."""
    images, labels = dataset.test
    seen = np.asarray(preprocess(dataset)(jnp.asarray(images), None))
    return 100 * float(np.mean(predict(model, seen).argmax(1) == labels))


if __name__ == "__main__":
    main()
