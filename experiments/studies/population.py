"""The distilled students of one data set and seed, trained in one program against one teacher."""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from kd2m_jax import NonFiniteLoss, TrainState, fit
from kd2m_jax.internal import Checkpoints

from ..common import files
from ..common.errors import UsageError
from ..data.specs import Dataset
from ..runs import restore
from ..runs.build import build
from ..runs.progress import shown
from ..runs.train import LOG_EVERY, devices, ran
from .grid import Cell

LIMIT = 8  # students per program, because each makes it longer to compile


def train_together(cells: list[Cell], dataset: Dataset) -> None:
    """Leave the checkpoints of finished distilled students in the folders of cells without any.

    `distil` then finds nothing left to train, and writes the rest of the folder from them. Where
    one student diverges no checkpoint is left, and `distil` trains each student on its own.
    """
    for shared, group in _groups(cells):
        with contextlib.suppress(NonFiniteLoss):
            _train(shared, group, dataset)
        shutil.rmtree(shared)


def _groups(cells: list[Cell]) -> Iterator[tuple[pathlib.Path, list[Cell]]]:
    """Yield cells to train together and the folder for it, first the interrupted ones."""
    seed = cells[0].folder.path.parent
    by_label = {cell.label: cell for cell in cells}
    waiting = {
        label: cell
        for label, cell in by_label.items()
        if cell.folder.diverged is None
        and not any((cell.folder.distilled / "last").glob("*"))
        # It brings a weight of the labels of its own, but `fit` takes one for all students.
        and cell.settings.distillation.coef != "published"
    }
    for file in sorted(seed.glob("together-*/labels.json")):
        try:
            labels = json.loads(file.read_bytes().decode())
        except ValueError as error:  # the group is made anew; this one is left as it is
            files.tell(f"{file} cannot be read ({error})")
            continue
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
            files.write(folder / "labels.json", text)
            yield folder, [waiting[label] for label in some]


def _train(shared: pathlib.Path, group: list[Cell], dataset: Dataset) -> None:
    """Train the distilled students of a group of cells, with checkpoints in a shared folder."""
    plans = [build(cell.settings, dataset) for cell in group]
    for cell, plan in zip(group, plans, strict=True):
        # A folder without a config.json is set aside when a run begins in it.
        with cell.folder.opened(plan.config, resume=True):
            pass
    for projector in dict.fromkeys(p for plan in plans for p in plan.projectors):
        print(projector)
    first = plans[0]
    cache = group[0].folder.teacher(first.config)
    teacher = restore.last(first.teacher, cache)
    matching = [plan.matching(teacher) for plan in plans]
    with shown(f"{len(group)} distilled students", first) as progress:
        results = fit(
            [plan.distilled for plan in plans],
            dataset.train,
            teacher=teacher,
            metric=[options.get("metric") for options in matching],
            coef=[plan.coef for plan in plans],
            task_coef=first.config.task_coef,
            eval_data=dataset.test,
            log_every=LOG_EVERY,
            callbacks=[progress],
            checkpoint_dir=shared,
            **first.options,
        )
    states = [result.state for result in results]
    with contextlib.closing(Checkpoints(shared)) as checkpoints:
        last = checkpoints.restore(states)
        best = checkpoints.restore([state.variables for state in states], best=True)
    if last is None or best is None:
        raise UsageError(f"the checkpoints in {shared} cannot be read: delete it to train anew")
    (_, record), (best_variables, _) = last, best
    speed = progress.per_second()
    for i, (cell, plan) in enumerate(zip(group, plans, strict=True)):
        with cell.folder.opened(plan.config, resume=True) as folder:
            folder.write_environment(**devices(), **ran(plan), students_in_one_program=len(group))
            if speed:  # of each student; the program trains so many at once
                folder.write_speed("distilled", len(group) * speed)
        _hand_over(cell, states[i], best_variables[i], _of_one(record, i))


def _of_one(record: Any, i: int) -> Any:
    """Return one student's part of a population's record, whose lists have an entry for each."""
    if isinstance(record, dict):
        return {key: _of_one(value, i) for key, value in record.items()}
    return [record[i]] if isinstance(record, list) else record


def _hand_over(cell: Cell, state: TrainState, best: Any, record: dict) -> None:
    """Save a student as `fit` would have saved it alone."""
    with contextlib.closing(Checkpoints(cell.folder.distilled)) as checkpoints:
        checkpoints.save(int(state.step), [state], record, best=[best])
