"""Train teacher, student alone and distilled student: what every training main does."""

import contextlib
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Unpack

import jax
import numpy as np
from flax import nnx

from kd2m_jax import FitResult, Network, fit
from kd2m_jax.internal import (
    after_first,
    by_first,
    gathered,
    held_by_first,
    is_first,
    locked,
    start,
    watched,
)

from ..common import files
from ..common.errors import UsageError
from ..data.load import load
from ..data.pictures import Pictures, for_fit
from ..data.specs import Dataset
from . import report
from .build import Matching, Plan, build, check_names, solvers
from .configuration import RunConfig, configuration, run_path
from .folder import RunFolder
from .progress import shown
from .settings import Run, Settings, check

LOG_EVERY = 10  # steps from one record to the next


def train_and_report(settings: Settings, data: str | Callable[[], Dataset]) -> None:
    """Run the three phases into a run folder and print its table.

    The data set is one of `DATASETS`, by its name, or what a function reads.
    """
    check(settings)
    with started(settings.run):
        check_names(settings)
        read = (lambda: load(data, settings.run.data_dir)) if isinstance(data, str) else data
        dataset = after_first(read)
        folder = distil(settings, dataset)
        print(f"\n{report.text_table(folder)}\n\nReport: {folder.report}")


@contextlib.contextmanager
def started(run: Run):
    """Meet the other processes, if there are any; all but the first keep quiet."""
    if not run.distributed:
        yield
        return
    try:
        start(run.coordinator, run.num_processes, run.process_id)
    except ValueError as error:
        raise UsageError(
            "--distributed detects no Slurm, Open MPI or TPU pod here: give --coordinator, "
            "--num-processes and --process-id"
        ) from error
    with contextlib.ExitStack() as stack, watched():
        if not is_first():
            # Now, because JAX itself ends this process when the first one is gone.
            print(
                f"Process {jax.process_index()}: process 0 prints. Should the run break off, the "
                "same command in each, with --resume, continues it.",
                file=sys.stderr,
            )
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        yield


def distil(settings: Settings, dataset: Dataset, folder: RunFolder | None = None) -> RunFolder:
    """Train teacher, student alone and distilled student; returns the run folder.

    The folder is the one that the settings name, unless a cell of a table is given.
    """
    config = configuration(settings, dataset)
    _check_processes_agree(config)
    plan = build(config, dataset)
    _check_batch(plan)
    for projector in plan.projectors:
        print(projector)
    folder = folder or RunFolder(run_path(settings, dataset))
    opened = folder.opened(plan.config, resume=settings.run.resume)
    with held_by_first(opened) as folder:
        by_first(lambda: folder.write_environment(**devices(), **ran(plan)))
        phase = functools.partial(run_phase, folder, plan, save_every=settings.run.save_every)
        cache = folder.teacher(plan.config)
        # Several runs share a teacher: one trains it, the others wait.
        with held_by_first(locked(cache / ".training", waiting=print)):
            # A cached teacher says what made it.
            by_first(lambda: files.write_json(cache / "made_by.json", plan.config.makes_teacher))
            teacher = phase("teacher", plan.teacher, cache).student
        phase("student", plan.student, folder.student)
        if plan.metric is not None:
            phase("distilled", plan.distilled, folder.distilled, **plan.matching(teacher))
        by_first(lambda: report.write(folder))
    return folder


def run_phase(
    folder: RunFolder,
    plan: Plan,
    phase: str,
    network: nnx.Module | Network,
    checkpoint_dir: pathlib.Path,
    *,
    save_every: float,
    **matching: Unpack[Matching],
) -> FitResult:
    """Train one network, with a progress bar, into the run folder."""
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(shown(report.TITLES[phase], plan))
        callbacks = [stack.enter_context(folder.writer(phase)), bar] if is_first() else []
        result = fit(
            network,
            for_fit(plan.dataset.train, plan.config.batch_size, plan.config.seed),
            eval_data=for_fit(plan.dataset.test, 500, None),
            log_every=LOG_EVERY,
            callbacks=[*callbacks, *plan.callbacks],
            checkpoint_dir=checkpoint_dir,
            save_every=save_every,
            **plan.options,
            **matching,
        )
    if speed := bar.per_second():
        folder.write_speed(phase, speed)
    return result


def devices() -> dict:
    """Return what env.json says of the devices."""
    return {
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
    }


def ran(plan: Plan) -> dict:
    """Return what env.json says of the solvers that ran, if the metric has any."""
    found = solvers(plan.metric)
    return {"solver": found} if found else {}


def _check_processes_agree(config: RunConfig) -> None:
    """Raise UsageError, in all processes, where one was started with other settings."""
    first, *others = (RunConfig.from_json(json.loads(text))
                      for text in gathered(json.dumps(config.to_json())))  # fmt: skip
    for number, other in enumerate(others, 1):
        if changes := first.changes(other):
            what = ", ".join(f"{k} {a} in 0, {b} in {number}" for k, (a, b) in changes.items())
            raise UsageError(f"processes 0 and {number} were started with other settings: {what}")


def _check_batch(plan: Plan) -> None:
    """Raise UsageError for a batch that does not fit the training set or the devices."""
    size, per_class, number = plan.config.batch_size, plan.config.per_class, jax.device_count()
    images, labels = plan.dataset.train
    if per_class and isinstance(images, Pictures):
        raise UsageError(
            f"--per-class orders pictures in memory, and these do not fit: {len(images):,} of "
            f"{images.size}x{images.size}"
        )
    if size > len(images):
        raise UsageError(
            f"--batch-size {size} is larger than the training set ({len(images)} images)"
        )
    if per_class and size % per_class:
        raise UsageError(f"--per-class {per_class} does not divide --batch-size {size}")
    if per_class:
        filled = sum(count // per_class * per_class for count in np.bincount(labels))
        if filled < size:
            raise UsageError(
                f"--per-class {per_class} leaves {filled} images, fewer than --batch-size {size}"
            )
    if size % number:
        raise UsageError(f"--batch-size {size} does not split evenly over {number} devices")
