"""One trained network of a run folder, with what it takes to use it on pictures."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from kd2m_jax import Network, Outputs, from_nnx

from ..common.errors import UsageError
from ..data.augment import preprocess
from ..data.load import load
from ..data.specs import Dataset
from ..runs import restore
from ..runs.build import network
from ..runs.configuration import RunConfig
from ..runs.folder import RunFolder

WHICH = ("distilled", "student", "teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network.

    Attributes:
      folder: the run that trained it.
      config: that run's.
      which: one of `WHICH`.
      module: the network, in evaluation mode; it takes normalised images.
      classes: the names of its classes.
      shape: of an image, ``(height, width, channels)``.
      prepare: uint8 images ``[n, height, width, channels]`` -> normalised ones.
      facts: mean and std of the normalisation.
    """

    folder: RunFolder
    config: RunConfig
    which: str
    module: nnx.Module
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    prepare: Callable[[Any], Any]
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the network."""
        return self.config.teacher if self.which == "teacher" else self.config.student

    def __call__(self, x: Any) -> Outputs:
        """Return features and logits of uint8 images."""
        return self.module(self.prepare(x))  # pyright: ignore[reportCallIssue]

    @property
    def network(self) -> Network:
        """Return it as a network of uint8 images."""
        inner = from_nnx(self.module)

        def apply(params, state, x, *, train, rng=None):
            return inner.apply(params, state, self.prepare(x), train=train, rng=rng)

        return Network(inner.init, apply, variables=inner.variables)


def run_folder(path: str) -> RunFolder:
    """Return a finished run's folder; UsageError where there is none."""
    folder = RunFolder(pathlib.Path(path))
    if not folder.path.is_dir():
        raise UsageError(f"there is no folder --run {path}")
    if not folder.finished and (folder.path / "config.json").exists():
        raise UsageError(
            f"the run in --run {path} did not come to its end: its command with --resume "
            "continues it, unless it diverged"
        )
    if not folder.finished:
        raise UsageError(f"--run {path} is not the folder of a finished run")
    return folder


def trained(folder: RunFolder, dataset: Dataset, which: str | None = None) -> Trained:
    """Read a trained network back: the distilled student, or the student of a run without one."""
    config = folder.config
    which = which or ("distilled" if folder.distilled.exists() else "student")
    checkpoints = folder.teacher(config) if which == "teacher" else getattr(folder, which)
    # Its weights are those of the checkpoint, whatever it began with.
    fresh = dataclasses.replace(config, pretrained_teacher=None, pretrained_student=None)
    empty = network("teacher" if which == "teacher" else "student", dataset, fresh)
    module = restore.last(empty, checkpoints)
    prepare = preprocess(dataset)
    return Trained(
        folder=folder,
        config=config,
        which=which,
        module=module,
        classes=dataset.classes,
        shape=dataset.train[0].shape[1:],
        prepare=lambda x: prepare(x, None),
        facts={"mean": list(dataset.mean), "std": list(dataset.std)},
    )


def check_data_dir(config: RunConfig, data_dir: str | None) -> None:
    """Raise UsageError for a folder of tensorflow-datasets where a run has other data."""
    if data_dir is not None and config.dataset in ("digits", "images"):
        raise UsageError(f"--data-dir has no meaning for a run on {config.dataset}")


def known(folder: RunFolder, data_dir: str | None) -> Dataset:
    """Return what a run's networks need to know of its data: of one's own pictures, no picture."""
    config = folder.config
    check_data_dir(config, data_dir)
    if config.images is None:
        return load(config.dataset, data_dir)
    images = config.images
    nothing = np.zeros((0, images["size"], images["size"], 3), np.uint8), np.zeros(0, np.int32)
    return Dataset(
        name=config.dataset,
        classes=tuple(images["classes"]),
        train=nothing,
        test=nothing,
        mean=tuple(images["mean"]),
        std=tuple(images["std"]),
        crop_padding=0,
        flip=False,
    )
