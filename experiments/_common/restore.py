"""The networks of a finished run folder, and what they make of test images."""

import contextlib
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments._common.configuration import teacher_name
from experiments._common.grid import ALONE
from experiments._common.train import (
    _metric,
    _network,
    _with_class_cost,
    _with_projector,
)
from experiments.common.errors import UsageError
from experiments.data.augment import preprocess
from experiments.data.load import load
from experiments.data.specs import Dataset, data_sha256, shortened
from experiments.runs.protocols import PROTOCOLS
from kd2m_jax import Network, Outputs, losses
from kd2m_jax._checkpoints import Checkpoints
from kd2m_jax.networks import as_network
from kd2m_jax.step import init_state


class Finished(NamedTuple):
    """A run folder, read back.

    Attributes:
      config: its config.json.
      dataset: its data set.
      metric: what the distilled student was asked to match.
      fresh: the two kinds of student before training: "student" and, with its projector if it
        needs one, "distilled".
      trained: "teacher", "student" and "distilled" as they were after the last epoch.
    """

    config: dict
    dataset: Dataset
    metric: losses.Metric | losses.MetricSum
    fresh: dict[str, nnx.Module | Network]
    trained: dict[str, nnx.Module]


def finished(path: str | pathlib.Path, data_dir: str | None) -> Finished:
    """Read a run folder with a distilled student back; UsageError where there is none."""
    path = pathlib.Path(path)
    if not (path / "report.md").exists():
        raise UsageError(f"--run {path} is not the folder of a finished run")
    config = json.loads((path / "config.json").read_text())
    metric = _metric(config)
    if metric is None:
        raise UsageError(f"--run {path} has no distilled student: its metric is none")
    dataset = load(config["dataset"], data_dir)
    if "train_examples" in config:
        dataset = shortened(dataset, config["train_examples"])
    if data_sha256(dataset) != config["data_sha256"]:
        raise UsageError(
            f"--run {path} was trained on other images than those of {config['dataset']} here "
            "(data_sha256). After --train-examples, the table's command once more notes how many"
        )
    teacher, student = (_network(role, dataset, config) for role in ("teacher", "student"))
    fresh = {"student": student, "distilled": _with_projector(student, teacher, dataset, metric)}
    alone = path / "checkpoints" / "student"
    if not alone.exists():  # a table keeps one for all metrics
        alone = path.parent / ALONE / "checkpoints" / "student"
    folders = {
        "teacher": path.parent / "teachers" / teacher_name(config),
        "student": alone,
        "distilled": path / "checkpoints" / "distilled",
    }
    models = {"teacher": teacher, **fresh}
    trained = {k: last(models[k], folder, config, dataset) for k, folder in folders.items()}
    metric = _with_class_cost(metric, trained["teacher"], dataset)
    return Finished(config, dataset, metric, fresh, trained)


def last(model, folder: pathlib.Path, config: dict, dataset: Dataset) -> nnx.Module:
    """A network as a checkpoint folder's last epoch has it; ``model`` is one of its kind."""
    if not (folder / "last").exists():
        raise UsageError(f"there is no checkpoint in {folder}: has it been moved?")
    network = as_network(model)
    x = jnp.zeros((1, *dataset.train[0].shape[1:]))
    optimizer = PROTOCOLS[config["protocol"]].optimizer(config["epochs"], 1)
    with contextlib.closing(Checkpoints(folder, writing=False)) as checkpoints:
        # A list, for `fit` saves a population, of one here.
        found = checkpoints.restore([init_state(network, optimizer, x, key=jax.random.key(0))])
    if found is None:
        raise UsageError(f"the checkpoints in {folder} cannot be read")
    return network.export(*found[0][0].variables)


def outputs(model: nnx.Module, dataset: Dataset, images: np.ndarray) -> Outputs:
    """Features and logits of uint8 images, in evaluation mode."""
    prepare = preprocess(dataset)

    @nnx.jit
    def apply(model, x):
        out = model(prepare(x, None))
        return out.features, out.logits

    parts = [apply(model, jnp.asarray(images[i : i + 500])) for i in range(0, len(images), 500)]
    # By way of the host: a network that `fit` trained lies on all devices, a restored one on one.
    features, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Outputs(jnp.asarray(features), jnp.asarray(logits))


def same_size(out: dict[str, Outputs]) -> None:
    """UsageError where student and teacher features have not the same size."""
    sizes = {name: one.features.shape[1] for name, one in out.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(
            f"features must be of one size to be compared, and are not: {told}. Distil between "
            "two networks that share it, as resnet20 and resnet8 do (64)"
        )
