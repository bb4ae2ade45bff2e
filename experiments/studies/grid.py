"""The cells of a study: one run per data set, seed and metric."""

import dataclasses
import itertools
import pathlib
import re
from typing import Annotated, Any, Literal

from .. import cifar, digits, mnist, svhn
from ..common.cli import optional
from ..common.errors import UsageError
from ..runs.folder import ALONE, RunFolder
from ..runs.settings import Distillation, Run, Settings, check

# What a data set's cells have in common with its main.
DEFAULTS: dict[str, Settings] = {
    "digits": digits.DEFAULTS,
    "mnist": mnist.DEFAULTS,
    "svhn": svhn.DEFAULTS,
    "cifar10": cifar.DEFAULTS,
    "cifar100": cifar.DEFAULTS,
}
_MAINS = "the main's"
# A metric, or several with a plus, each with its options (jw2:beta=0.5), and lambda after an
# equals sign of its own.
_TERM = r"[^:=+]+(?::[^:=+]+=[^:=+]+)*"
_ITEM = rf"({_TERM}(?:\+{_TERM})*)(?:=(.+))?"


@dataclasses.dataclass(frozen=True)
class Grid:
    """What all cells have in common. "The main's": as in the data set's own main."""

    seeds: int = 5
    """Seeds 0, 1, ..., each with its own teacher."""
    teacher: Annotated[str | None, optional("STR", _MAINS)] = None
    """The teacher's network."""
    student: Annotated[str | None, optional("STR", _MAINS)] = None
    """The student's network."""
    stem: Annotated[Literal["cifar", "imagenet"] | None, optional("STR", _MAINS)] = None
    """ResNets start with: cifar, imagenet."""
    pretrained_teacher: Annotated[str | None, optional("PTH", "random")] = None
    """Torch weights to start from."""
    pretrained_student: Annotated[str | None, optional("PTH", "random")] = None
    """The same for the student."""
    protocol: Annotated[str | None, optional("STR", _MAINS)] = None
    """Optimizer and schedule."""
    epochs: Annotated[int | None, optional("INT", "the protocol's")] = None
    """Passes over the data."""
    batch_size: Annotated[int | None, optional("INT", "the protocol's")] = None
    """Examples per step."""
    per_class: Annotated[int | None, optional("INT", "any")] = None
    """Examples per class in a row."""
    precision: Annotated[Literal["f32", "bf16"] | None, optional("STR", _MAINS)] = None
    """The networks' precision: f32 or bf16."""
    task_coef: Annotated[float | None, optional("FLOAT", _MAINS)] = None
    """Weight of the cross-entropy, >= 0."""
    train_examples: Annotated[int | None, optional("INT", "all")] = None
    """Train on the first so many images."""
    data_dir: Annotated[str | None, optional("DIR", "~/tensorflow_datasets")] = None
    """Data, fetched if missing."""
    out: str = "runs/table"
    """Cells and results; finished ones are reused."""
    max_steps: Annotated[int | None, optional("INT", "no limit")] = None
    """Cut each phase short: a smoke run."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a data set, a metric with its lambda, a seed.

    Attributes:
      row: the metric as the user wrote it, the same for all data sets.
      label: the metric with its lambda if that is not the data set's own, which names the folder.
    """

    dataset: str
    row: str
    label: str
    seed: int
    settings: Settings

    @property
    def folder(self) -> RunFolder:
        """Return its run folder."""
        return RunFolder(pathlib.Path(str(self.settings.run.out)), in_table=True)


def cell(grid: Grid, dataset: str, metric: str, seed: int, coef: str | None = None) -> Cell:
    """Return the cell of a metric, written NAME or NAME=LAMBDA; ``coef`` is for a bare NAME.

    Its folder has lambda in its name unless it is the main's, so that runs with different lambdas
    lie side by side.
    """
    from kd2m_jax.internal import terms  # loads JAX

    if dataset not in DEFAULTS:
        raise UsageError(f"unknown data set {dataset!r}: one of {', '.join(DEFAULTS)}")
    main = DEFAULTS[dataset]
    parsed = re.fullmatch(_ITEM, metric)
    name, own = parsed.groups() if parsed else (metric, None)
    default = main.distillation.coef
    if ":" not in name:
        name = name.replace("_", "-").lower()
    weights, default = _weights(own or coef or default), _weights(default)
    if name == ALONE:  # it has neither lambda nor a weight of the labels
        metric, label, distillation = name, name, Distillation(metric=name, coef="0")
    else:
        if "," not in weights and not weights[:1].isalpha():  # one number for all terms of a sum
            weights = ",".join([weights] * len(terms(name)))
        label = name if weights == default else f"{name}={weights}"
        labels = main.distillation.task_coef if grid.task_coef is None else grid.task_coef
        distillation = Distillation(name, weights, labels)

    def with_given(part) -> Any:
        given = {k: v for k, v in vars(grid).items() if k in vars(part) and v is not None}
        return dataclasses.replace(part, **given)

    folder = pathlib.Path(grid.out) / dataset / f"seed{seed}" / label.replace(":", "-")
    settings = Settings(
        distillation,
        with_given(main.networks),
        dataclasses.replace(with_given(main.training), seed=seed),
        Run(grid.data_dir, str(folder), resume=True, max_steps=grid.max_steps),
    )
    return Cell(dataset, metric, label, seed, settings)


def _weights(coef: str) -> str:
    """Spell every weight in one way; what is no number is left to `check`."""
    try:
        return ",".join(f"{float(number):g}" for number in coef.split(","))
    except ValueError:
        return coef


def cells(grid: Grid, datasets: tuple[str, ...], metrics: tuple[str, ...], coef: str | None = None):
    """List and check all cells: a seed's after one another, its student alone first."""
    from ..runs.build import check_names  # loads JAX, which --help does not need

    for flag, value in (("--seeds", grid.seeds), ("--train-examples", grid.train_examples)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")
    if not datasets:
        raise UsageError("--dataset needs a data set")
    rows: dict[tuple[str, ...], str] = {}
    for metric in (ALONE, *metrics):
        ones = [cell(grid, dataset, metric, 0, coef) for dataset in datasets]
        for one in ones:
            check(one.settings)
            check_names(one.settings)
        # A metric written twice, even in two ways, is one row, unless data sets differ in it.
        rows.setdefault(tuple(one.label for one in ones), metric)
    places = itertools.product(dict.fromkeys(datasets), range(grid.seeds), rows.values())
    return [cell(grid, dataset, metric, seed, coef) for dataset, seed, metric in places]


def scores(one: Cell, phase: str) -> list[float | None]:
    """Return a phase's test accuracies in percent, one per epoch; None if the run diverged."""
    if one.folder.diverged is not None:
        return [None]
    return [
        100 * line["test_accuracy"]
        for line in one.folder.records
        if line["phase"] == phase and "test_accuracy" in line
    ]
