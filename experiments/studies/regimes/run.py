"""Run what is missing of a study, one JSON file per data set and regime."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from kd2m_jax.internal import locked

from ...common.errors import UsageError
from ...data.load import load
from . import adapted, labelled
from .networks import World, world
from .rows import LABEL_FREE as LABEL_FREE_ROWS
from .rows import ROWS
from .store import Store
from .study import (
    AUTO,
    CURVE,
    CURVE_ROWS,
    CURVES,
    LABEL_FREE,
    LABELLED,
    PAIRS_ROWS,
    SMOKE_COEFS,
    SMOKE_METHODS,
    SMOKE_ROWS,
    STUDIES,
    Study,
    about,
    regimes_of,
    smoked,
)  # fmt: skip


def run(
    out: pathlib.Path,
    dataset_name: str,
    regimes: Sequence[str],
    seeds: int,
    *,
    data_dir: str | None,
    smoke: bool,
) -> Iterator[Store]:
    """Train what is missing of the regimes; yield each one's numbers when they are whole."""
    study = smoked(STUDIES[dataset_name]) if smoke else STUDIES[dataset_name]
    for regime in regimes:
        if regime not in regimes_of(study):
            raise UsageError(
                f"--dataset={dataset_name} has {', '.join(regimes_of(study))}: not {regime}"
            )
    dataset = load(dataset_name.removesuffix("-conv"), data_dir)
    if smoke:
        dataset = dataclasses.replace(dataset, test=tuple(part[:200] for part in dataset.test))
    folder = out / dataset_name
    folder.mkdir(parents=True, exist_ok=True)
    seen = world(dataset, study, folder)
    teacher = round(labelled.accuracy(seen.teacher, seen.test_x, seen.test_y), 2)
    for regime in regimes:
        parts = {"shift": study.shifts, "curve": CURVES}.get(regime)
        names = [f"{regime}-{part}" for part in parts] if parts else [regime]
        for name in names[:1] if smoke else names:
            order = adapted.methods_of(study) if regime == "shift" else rows_of(name, study)
            with locked(folder / f"{name}.lock"):
                described = about(dataset_name, name, study, teacher)
                store = Store(folder / f"{name}.json", described, order)
                _fill(store, name, seen, study, range(1 if smoke else seeds), smoke=smoke)
                yield store


def _fill(
    store: Store, regime: str, seen: World, study: Study, seeds: Sequence[int], *, smoke: bool
) -> None:
    """Train what a regime lacks."""
    if regime.startswith("shift-"):
        _fill_shift(store, regime.removeprefix("shift-"), seen, study, seeds, smoke=smoke)
        return
    rows = rows_of(regime, study)
    if smoke and regime != "pairs":
        rows = [row for row in rows if row in SMOKE_ROWS]
    missing = [(row, s) for row in rows for s in seeds if not store.has(row, s)]
    for row, seed in _shown(missing, f"{seen.dataset.name}, {regime}"):
        if regime == LABEL_FREE:
            found = labelled.label_free(seen, study, ROWS[row], seed)
        elif regime == "pairs":
            found = labelled.paired(seen, study, ROWS[row], seed)
        else:
            coefs = (*CURVE, *AUTO) if regime.startswith("curve-") else None
            coefs = (study.coefs[row],) if study.coefs else coefs
            coefs = SMOKE_COEFS if smoke else coefs
            labels = regime.removeprefix("curve-")
            found = labelled.trained(seen, study, labels, ROWS[row], seed, coefs)
        store.put(row, seed, found)


def _fill_shift(
    store: Store, name: str, seen: World, study: Study, seeds: Sequence[int], *, smoke: bool
) -> None:
    """Train what a shifted domain lacks: seed by seed, because the source is a seed's."""
    methods = SMOKE_METHODS if smoke else adapted.methods_of(study)
    for seed in seeds:
        missing = [row for row in methods if not store.has(row, seed)]
        if not missing:
            continue
        place = adapted.domain(seen, study, name, seed)
        for row in _shown(missing, f"{seen.dataset.name}, {name}, seed {seed}"):
            store.put(row, seed, adapted.adapted(seen, study, place, adapted.METHODS[row], seed))


def rows_of(regime: str, study: Study) -> tuple[str, ...]:
    """Return the rows of a regime with labels, or of the one without any."""
    if study.coefs:
        return tuple(study.coefs)
    if regime.startswith("curve-"):
        return CURVE_ROWS
    if regime == "pairs":
        return PAIRS_ROWS
    return tuple(ROWS) if regime in LABELLED else LABEL_FREE_ROWS


def _shown(work: Sequence[Any], title: str):
    return tqdm(work, desc=title, file=sys.stderr)
