"""The distilled students of one data set and seed, trained in one program against one teacher."""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
from tqdm import tqdm

from experiments._common import restore
from experiments._common.configuration import teacher_name
from experiments._common.folder import RunFolder
from experiments._common.grid import Cell
from experiments._common.train import (
    LOG_EVERY,
    Progress,
    _metric,
    _with_class_cost,
    _with_projector,
    coefficient,
    configured,
    fit_options,
)
from experiments.common.errors import UsageError
from experiments.data.specs import Dataset
from kd2m_jax import NonFiniteLoss, fit
from kd2m_jax._batches import steps_per_epoch
from kd2m_jax._checkpoints import Checkpoints
from kd2m_jax.step import TrainState

LIMIT = 8  # students a program: each makes it longer to compile


def train_together(cells: list[Cell], dataset: Dataset) -> None:
    """Leave the checkpoints of finished distilled students in the folders of cells without any.

    `distil` then finds nothing left to train, and writes the rest of the folder from them. Where
    one diverges, none is left, and `distil` trains each on its own.
    """
    for folder, group in _groups(cells):
        with contextlib.suppress(NonFiniteLoss):
            _train(folder, group, dataset)
        shutil.rmtree(folder)


def _groups(cells: list[Cell]) -> Iterator[tuple[pathlib.Path, list[Cell]]]:
    """Cells to train together, and the folder for it; first those that were interrupted."""
    seed = cells[0].path.parent
    by_label = {cell.label: cell for cell in cells}
    waiting = {
        label: cell
        for label, cell in by_label.items()
        if cell.diverged is None
        and not any((_own(cell) / "last").glob("*"))
        # It brings a weight of the labels of its own, and `fit` has one for all.
        and cell.settings.distillation.coef != "published"
    }
    for file in sorted(seed.glob("together-*/labels.json")):
        labels = json.loads(file.read_text())
        if all(label in by_label for label in labels):
            yield file.parent, [by_label[label] for label in labels]
            waiting = {k: c for k, c in waiting.items() if k not in labels}
    labels = list(waiting)
    for start in range(0, len(labels), LIMIT):
        some = labels[start : start + LIMIT]
        if len(some) > 1:
            text = json.dumps(some)
            folder = seed / f"together-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "labels.json").write_text(text)
            yield folder, [waiting[label] for label in some]


def _own(cell: Cell) -> pathlib.Path:
    return cell.path / "checkpoints" / "distilled"


def _train(folder: pathlib.Path, group: list[Cell], dataset: Dataset) -> None:
    parts = [configured(cell.settings, dataset) for cell in group]
    for cell, (config, *_) in zip(group, parts, strict=True):
        # A folder without a config.json is set aside when a run begins in it.
        with RunFolder.opened(cell.path, config, resume=True):
            pass
    config, teacher, student = parts[0]
    cache = group[0].path.parent / "teachers" / teacher_name(config)
    teacher = restore.last(teacher, cache, config, dataset)
    metrics = [_with_class_cost(_metric(config), teacher, dataset) for config, *_ in parts]
    per_epoch = steps_per_epoch(dataset.train[1], config["batch_size"], config["per_class"])
    steps = min(config["epochs"] * per_epoch, config["max_steps"] or config["epochs"] * per_epoch)
    with tqdm(
        desc=f"{len(group)} distilled students",
        total=steps * config["batch_size"],
        unit=" images",
        unit_scale=True,
        leave=None,
    ) as bar:
        progress = Progress(bar, config["batch_size"])
        results = fit(
            [_with_projector(student, teacher, dataset, metric) for metric in metrics],
            dataset.train,
            teacher=teacher,
            metric=metrics,
            coef=[coefficient(config, dataset) for config, *_ in parts],
            task_coef=config["task_coef"],
            eval_data=dataset.test,
            log_every=LOG_EVERY,
            callbacks=[progress],
            checkpoint_dir=folder,
            **fit_options(config, dataset),
        )
    states = [result.state for result in results]
    with contextlib.closing(Checkpoints(folder)) as shared:
        last = shared.restore(states)
        best = shared.restore([state.variables for state in states], best=True)
    if last is None or best is None:
        raise UsageError(f"the checkpoints in {folder} cannot be read: delete it to train anew")
    (_, record), (best, _) = last, best
    for i, (cell, (config, *_)) in enumerate(zip(group, parts, strict=True)):
        with RunFolder.opened(cell.path, config, resume=True) as own:
            _describe(own, len(group), progress.images_per_second())
        _hand_over(cell, states[i], best[i], _of_one(record, i))


def _of_one(record: Any, i: int) -> Any:
    """What a population's record says of one student: its lists have an entry for each."""
    if isinstance(record, dict):
        return {key: _of_one(value, i) for key, value in record.items()}
    return [record[i]] if isinstance(record, list) else record


def _describe(folder: RunFolder, students: int, speed: float | None) -> None:
    devices = [d.device_kind for d in jax.devices()]
    folder.write_environment(
        devices=devices, backend=jax.default_backend(), students_in_one_program=students
    )
    if speed:  # that of each of them, of which it does so many at once
        folder.write_speed("distilled", students * speed)


def _hand_over(cell: Cell, state: TrainState, best: Any, record: dict) -> None:
    """Save a student as `fit` would have alone."""
    with contextlib.closing(Checkpoints(_own(cell))) as checkpoints:
        checkpoints.save(int(state.step), [state], record, best=[best])
