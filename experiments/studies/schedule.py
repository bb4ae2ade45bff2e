"""Train the cells of a study that are not there yet."""

import itertools

from tqdm import tqdm

from kd2m_jax import NonFiniteLoss

from ..data.load import load
from ..data.specs import Dataset, shortened
from ..runs.build import build
from ..runs.train import distil
from .grid import Cell, Grid
from .population import train_together


def train(grid: Grid, cells: list[Cell], together: bool = False) -> dict[str, dict[str, int]]:
    """Train the cells that are not finished, with a bar of cells done and time left.

    A run that diverges is recorded in its folder, and the others go on. With ``together`` the
    distilled students of a data set and seed are trained in one program.

    Returns:
      For each data set how many examples there are to train and to test on.
    """
    dataset, sizes = None, {}
    with tqdm(total=len(cells), unit=" cells", desc="Cells", smoothing=0) as bar:
        for (name, seed), group in itertools.groupby(cells, lambda c: (c.dataset, c.seed)):
            if dataset is None or dataset.name != name:
                dataset = load(name, grid.data_dir)
                if grid.train_examples:
                    dataset = shortened(dataset, grid.train_examples)
                sizes[name] = {"train": len(dataset.train[0]), "test": len(dataset.test[0])}
            alone, *others = group
            for cell in (alone, *others):
                bar.set_postfix_str(f"{name}, seed {seed}, {cell.row}")
                if together and cell in others[:1] and alone.folder.diverged is None:
                    train_together(others, dataset)
                if _settled(cell, dataset):  # takes no time, so it must not count in the estimate
                    bar.initial += 1
                else:
                    try:
                        distil(cell.settings, dataset, cell.folder)
                    except NonFiniteLoss as error:
                        cell.folder.write_diverged(str(error))
                        tqdm.write(f"{name}, seed {seed}, {cell.row}: {error}; left out")
                bar.update()
    return sizes


def _settled(cell: Cell, dataset: Dataset) -> bool:
    """Tell whether a cell ended before; UsageError if that was with another configuration."""
    if not cell.folder.finished and cell.folder.diverged is None:
        return False
    plan = build(cell.settings, dataset)
    with cell.folder.opened(plan.config, resume=True):
        return True
