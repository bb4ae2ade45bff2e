"""Cells of a table: one run folder for each data set, seed and metric, trained or reused."""

import dataclasses
import importlib
import itertools
import json
import pathlib
import re
from typing import Annotated, Any, Literal

from tqdm import tqdm

from experiments._common.folder import RunFolder, read_metrics
from experiments.common.cli import optional
from experiments.common.errors import UsageError
from experiments.data.specs import DATASETS, Dataset, shortened
from experiments.runs.settings import Distillation, Run, Settings, check

ALONE = "none"
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
    """Examples a step."""
    per_class: Annotated[int | None, optional("INT", "any")] = None
    """Examples of a class that come together."""
    precision: Annotated[Literal["f32", "bf16"] | None, optional("STR", _MAINS)] = None
    """Of the networks: f32 or bf16."""
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
    def path(self) -> pathlib.Path:
        """Its run folder."""
        return pathlib.Path(str(self.settings.run.out))

    @property
    def alone(self) -> pathlib.Path:
        """Where its seed's student alone is kept."""
        return self.path.parent / ALONE / "checkpoints" / "student"

    @property
    def diverged(self) -> int | None:
        """The step at which its training diverged, if it did."""
        file = self.path / "diverged.json"
        return json.loads(file.read_text())["step"] if file.exists() else None


def cell(grid: Grid, dataset: str, metric: str, seed: int, coef: str | None = None) -> Cell:
    """The cell of a metric, written NAME or NAME=LAMBDA; ``coef`` is for those without their own.

    Its folder has lambda in its name unless it is the main's, so that runs with different ones
    lie side by side.
    """
    if dataset not in DATASETS:
        raise UsageError(f"unknown data set {dataset!r}: one of {', '.join(DATASETS)}")
    module = DATASETS[dataset].experiment.split()[0]
    main: Settings = importlib.import_module(module).DEFAULTS
    found = re.fullmatch(_ITEM, metric)
    name, own = found.groups() if found else (metric, None)
    default = main.distillation.coef
    if ":" not in name:
        name = name.replace("_", "-").lower()
    weights, default = _weights(own or coef or default), _weights(default)
    if name == ALONE:  # lambda and the weight of the labels are no settings of its
        metric, label, distillation = name, name, Distillation(metric=name, coef="0")
    else:
        if "," not in weights and not weights[:1].isalpha():  # one number for all terms of a sum
            weights = ",".join([weights] * (name.count("+") + 1))
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
    """One spelling of a weight; what is no number is left to `check`."""
    try:
        return ",".join(f"{float(number):g}" for number in coef.split(","))
    except ValueError:
        return coef


def cells(grid: Grid, datasets: tuple[str, ...], metrics: tuple[str, ...], coef: str | None = None):
    """All cells, a seed's after one another and its student alone first; checks them too."""
    from experiments._common.train import check_names  # loads JAX, which --help need not

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
        # Written twice, in two ways even, it is one row; but not where data sets tell them apart.
        rows.setdefault(tuple(one.label for one in ones), metric)
    places = itertools.product(dict.fromkeys(datasets), range(grid.seeds), rows.values())
    return [cell(grid, dataset, metric, seed, coef) for dataset, seed, metric in places]


def train(grid: Grid, wanted: list[Cell], together: bool = False) -> dict[str, dict[str, int]]:
    """Train what is not there yet, with a bar of cells done and time left.

    A run that diverges is recorded in its folder, and the others go on. With ``together`` the
    distilled students of a data set and seed are trained in one program.

    Returns for each data set how many examples there are to train and to test on.
    """
    from experiments._common.population import train_together
    from experiments._common.train import distil
    from experiments.data.load import load
    from kd2m_jax import NonFiniteLoss

    dataset, sizes = None, {}
    with tqdm(total=len(wanted), unit=" cells", desc="Cells", smoothing=0) as bar:
        for (name, seed), group in itertools.groupby(wanted, lambda c: (c.dataset, c.seed)):
            if dataset is None or dataset.name != name:
                dataset = load(name, grid.data_dir)
                if grid.train_examples:
                    dataset = shortened(dataset, grid.train_examples)
                sizes[name] = {"train": len(dataset.train[0]), "test": len(dataset.test[0])}
            alone, *others = group
            for one in (alone, *others):
                bar.set_postfix_str(f"{name}, seed {seed}, {one.row}")
                if together and one in others[:1] and alone.diverged is None:
                    train_together(others, dataset)
                if _settled(one, dataset):  # says nothing about how long the others will take
                    bar.initial += 1
                else:
                    try:
                        distil(one.settings, dataset, alone=one.alone)
                    except NonFiniteLoss as error:
                        _write_diverged(one, str(error))
                        tqdm.write(f"{name}, seed {seed}, {one.row}: {error}; left out")
                bar.update()
    return sizes


def _settled(one: Cell, dataset: Dataset) -> bool:
    """Whether it ended before; UsageError where that was with another configuration."""
    from experiments._common.train import configured

    if not (one.path / "report.md").exists() and one.diverged is None:
        return False
    config, *_ = configured(one.settings, dataset)
    with RunFolder.opened(one.path, config, resume=True):
        return True


def _write_diverged(one: Cell, message: str) -> None:
    found = re.search(r"step (\d+)", message)
    record = {"step": int(found[1]) if found else 0, "message": message}
    (one.path / "diverged.json").write_text(json.dumps(record) + "\n")


def scores(one: Cell, phase: str) -> list[float | None]:
    """Test accuracies of a run's phase in percent, one an epoch; None if the run diverged."""
    if one.diverged is not None:
        return [None]
    return [
        100 * line["test_accuracy"]
        for line in read_metrics(one.path)
        if line["phase"] == phase and "test_accuracy" in line
    ]
