"""The images that a finished run is evaluated on."""

from typing import Any

import numpy as np

from ..common.errors import UsageError
from ..data.folders import Folders, listed, load_folders
from ..data.pictures import Pictures
from ..data.specs import Dataset
from ..runs.folder import RunFolder
from .trained import known


def examples(
    folder: RunFolder, other: str | None, data_dir: str | None
) -> tuple[Dataset, tuple[Any, np.ndarray]]:
    """Return what is known of the data, and images with labels: the run's own, or others."""
    images = folder.config.images
    if other is None:
        dataset = known(folder, data_dir)
        try:
            return dataset, dataset.test if images is None else own(folder).test
        except UsageError as error:
            raise UsageError(f"{error}; --test=DIR names other pictures to evaluate on") from error
    if images is None:
        raise UsageError("--test takes pictures, and the run is of another kind of data")
    _, paths, labels = listed("--test", other, tuple(images["classes"]))
    return known(folder, data_dir), (Pictures(paths, images["size"]), np.array(labels, np.int32))


def own(folder: RunFolder) -> Dataset:
    """Read a run's own pictures again; UsageError where they are others now."""
    config = folder.config
    assert config.images is not None
    names = Folders.__dataclass_fields__
    dataset = load_folders(Folders(**{k: v for k, v in config.images.items() if k in names}))
    if dataset.digest != config.data_sha256:
        raise UsageError(
            f"--run {folder.path} was trained on other pictures than there are in "
            f"{config.images['train'] or config.images['dataset']} now"
        )
    return dataset
