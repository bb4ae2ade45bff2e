"""On one GPU: what a metric adds to a step, and how fast a distillation epoch is."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kd2m_jax import fit, from_nnx, models

from ..data.augment import preprocess
from ..data.specs import DATASETS, Dataset
from . import measure
from .step import beside_none, worst_case

PAIR = ("resnet34", "resnet18")
SHAPE = (32, 32, 3)
PAPER = ("w2", "cw2", "jw2", "gaussian-w2", "gaussian-cw2", "gaussian-kl")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Dense bfloat16 FLOP/s, from NVIDIA's data sheets (T4: float16, because it has no bfloat16). The
# first name that occurs in a device's name counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "T4": 65e12,
}


def gpu_step(
    out: str,
    pair: tuple[str, str] = PAIR,
    batches: Sequence[int] = (128, 512),
    metrics: Sequence[str] = PAPER,
    repeats: int = 30,
) -> tuple[list[dict], list[str]]:
    """Return rows and notes: each metric over none, in float32 and bfloat16, random images."""
    del out  # no plot
    rows, notes = [], []
    for batch in batches:
        for name, dtype in DTYPES.items():
            timed = beside_none((*pair, SHAPE), metrics, batch, repeats, dtype)
            rows += timed
            notes += worst_case(timed, f"{name}, batch {batch}", 1.05)
    return rows, notes


def gpu_epoch(
    out: str,
    pair: tuple[str, str] = PAIR,
    images: int = 50_000,
    batch: int = 512,
    repeats: int = 3,
) -> tuple[list[dict], list[str]]:
    """Return rows and notes: a bfloat16 epoch with w2, and its share of the GPU's peak."""
    del out
    row = epoch(random_images(images), pair, batch, "bfloat16", repeats)
    if row["utilisation"] is None:
        return [row], [f"No peak FLOP/s are known here for {jax.devices()[0].device_kind}."]
    title = f"model FLOP utilisation, bfloat16, batch {batch}"
    return [row], [measure.verdict(title, row["utilisation"], 0.3, least=True)]


def random_images(count: int) -> Dataset:
    """Imitate CIFAR-10 as far as time is concerned: random bytes, its crop, flip and statistics."""
    spec, rng = DATASETS["cifar10"], np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *SHAPE), np.uint8)
    data = (images, (np.arange(count) % 10).astype(np.int32))
    classes = tuple("0123456789")
    return Dataset(
        spec.source, classes, data, data, spec.mean, spec.std, spec.crop_padding, spec.flip
    )


def epoch(data: Dataset, pair: tuple[str, str], batch: int, dtype: str, repeats: int) -> dict:
    """Return one row: epochs of `kd2m_jax.fit` with w2, without the first, which compiles."""
    teacher, student = (
        models.build(
            name, num_classes=10, image_shape=SHAPE, rngs=nnx.Rngs(seed), dtype=DTYPES[dtype]
        )
        for seed, name in enumerate(pair)
    )
    ends = []
    fit(
        student,
        data.train,
        teacher=teacher,
        metric="w2",
        coef=1e-3,
        preprocess=preprocess(data),
        optimizer=optax.sgd(0.01, momentum=0.9),
        epochs=1 + repeats,
        batch_size=batch,
        log_every=10**9,  # at the ends of epochs alone
        progress=False,
        callbacks=[lambda record: ends.append(time.perf_counter())],
    )
    q1, median, q3 = (float(q) for q in np.percentile(1e3 * np.diff(ends), [25, 50, 75]))
    seen = len(data.train[0]) // batch * batch
    per_second = 1e3 * seen / median
    flops = (forward_flops(teacher) + 3 * forward_flops(student)) * per_second
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "what": "kd2m_jax",
        "dtype": dtype,
        "batch": batch,
        "ms": median,
        "q1": q1,
        "q3": q3,
        "images/s": per_second,
        "TFLOP/s": flops / 1e12,
        "utilisation": flops / peak / jax.device_count() if peak else None,
    }


def forward_flops(module: nnx.Module) -> float:
    """Count one image's FLOPs; a training step does three times as many, the usual count."""
    network, x = from_nnx(module), jnp.zeros((16, *SHAPE))
    apply = network.apply
    forward = jax.jit(lambda params, state, x: apply(params, state, x, train=False)[0].logits)
    # Before XLA's passes, which hide convolutions in calls of cuDNN.
    costs: Any = forward.lower(*network.init(None, x), x).cost_analysis()
    return costs["flops"] / len(x)


def peak_flops(device_kind: str) -> float | None:
    """Return a device's dense bfloat16 FLOP/s, None where they are not known here."""
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)
