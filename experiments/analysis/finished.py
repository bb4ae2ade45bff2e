"""A finished run folder, read back, and what its networks make of test images."""

import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd2m_jax import Outputs

from ..common.errors import UsageError
from ..data.augment import preprocess
from ..data.load import load
from ..data.specs import Dataset, data_sha256, shortened
from ..runs import restore
from ..runs.build import Plan, build
from ..runs.folder import ALONE, RunFolder
from .examples import own
from .trained import check_data_dir


class Finished(NamedTuple):
    """A run with a distilled student.

    Attributes:
      folder: where it is.
      plan: what it was made of.
      trained: "teacher", "student" and "distilled" as they were after the last epoch.
    """

    folder: RunFolder
    plan: Plan
    trained: dict[str, nnx.Module]


def finished(path: str | pathlib.Path, data_dir: str | None) -> Finished:
    """Read a run folder with a distilled student back; UsageError where there is none."""
    folder = RunFolder(pathlib.Path(path))
    if not folder.finished:
        raise UsageError(f"--run {path} is not the folder of a finished run")
    config = folder.config
    if config.metric == ALONE:
        raise UsageError(f"--run {path} has no distilled student: its metric is none")
    check_data_dir(config, data_dir)
    dataset = load(config.dataset, data_dir) if config.images is None else own(folder)
    if config.images is None and config.train_examples is not None:
        dataset = shortened(dataset, config.train_examples)
    if data_sha256(dataset) != config.data_sha256:
        raise UsageError(
            f"--run {path} was trained on other images than those of {config.dataset} here "
            "(data_sha256). After --train-examples, the table's command once more notes how many"
        )
    plan = build(config, dataset)
    if not folder.student.exists():  # a table keeps one for all metrics
        folder = RunFolder(folder.path, in_table=True)
    trained = {
        "teacher": restore.last(plan.teacher, folder.teacher(config)),
        "student": restore.last(plan.student, folder.student),
        "distilled": restore.last(plan.student, folder.distilled),
    }
    return Finished(folder, plan, trained)


def outputs(model: nnx.Module, dataset: Dataset, images: np.ndarray) -> Outputs:
    """Compute features and logits of uint8 images, in evaluation mode."""
    prepare = preprocess(dataset)

    @nnx.jit
    def apply(model, x):
        out = model(prepare(x, None))
        return out.features, out.logits

    parts = [apply(model, jnp.asarray(images[i : i + 500])) for i in range(0, len(images), 500)]
    # By way of the host: a network that `fit` trained lies on all devices, a restored one on one.
    features, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Outputs(jnp.asarray(features), jnp.asarray(logits))


def check_same_size(out: dict[str, Outputs]) -> None:
    """Raise UsageError where the networks' features differ in size."""
    sizes = {name: one.features.shape[1] for name, one in out.items()}
    if len(set(sizes.values())) > 1:
        which = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(
            f"features must be of one size to be compared, and are not: {which}. Distil between "
            "two networks that share it, as resnet20 and resnet8 do (64)"
        )
