"""Where a study's numbers come from: machines, versions, dates and training time. No JAX."""

import datetime
import re
from collections.abc import Iterable

from ..common.machine import processor
from ..runs.folder import ALONE
from .grid import Cell

_HOST = ("python", "machine", "cpu", "cores", "devices")


def of(cells: list[Cell]) -> dict:
    """Collect the first cell's environment, the differences between cells, and training seconds."""
    ones = list({cell.folder: cell for cell in cells}.values())
    environments = [_with_solver(cell, cell.folder.environment) for cell in ones]
    # A run that was resumed with other versions lists the versions that it was begun with apart.
    every = [
        _flat({**env, **other}) for env in environments for other in ({}, *env.get("earlier", []))
    ]
    keys = _distinct(key for env in every for key in env)
    values = {key: _distinct(env.get(key) for env in every) for key in keys}
    seconds = [s for one, env in zip(ones, environments, strict=True) for s in _seconds(one, env)]
    known = [s for s in seconds if s is not None]
    recorded = {"cpu_recorded": "cpu" in every[0], **processor()}
    return {
        "date": datetime.date.today().isoformat(),
        "trained": sorted({cell.folder.trained_on.isoformat() for cell in ones}),
        "environment": recorded | {key: found[0] for key, found in values.items()},
        "differ": {key: found for key, found in values.items() if len(found) > 1},
        "training_seconds": sum(known) if known else None,
        "trainings": {"timed": len(known), "all": len(seconds)},
    }


def sentence(found: dict) -> str:
    """Write the result of `of` as one paragraph."""
    env, trainings, dates = found["environment"], found["trainings"], found["trained"]
    machine = f"{env['cpu']}, {env['cores']} cores, {env['machine']}, {', '.join(env['devices'])}"
    noted = "" if env["cpu_recorded"] else " (where this was written; the runs did not note theirs)"
    host = (*_HOST, "cpu_recorded")
    versions = ", ".join(f"{key} {value}" for key, value in env.items() if key not in host)
    differ = "; ".join(f"{key}: {', '.join(map(str, v))}" for key, v in found["differ"].items())
    seconds, unknown = found["training_seconds"], trainings["all"] - trainings["timed"]
    spent = "unknown" if seconds is None else f"{datetime.timedelta(seconds=round(seconds))} h"
    missing = f", unknown for {unknown} of {trainings['all']}" if unknown and seconds else ""
    return (
        f"Machine: {machine}{noted}. Trained {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"written {found['date']}. Training took {spent} in all, compilation apart{missing}. "
        f"Python {env['python']}, {versions}. Different between runs: {differ or 'nothing'}."
    )


def _with_solver(cell: Cell, env: dict) -> dict:
    """Say of runs from before solvers were written down what they took."""
    terms = cell.folder.config.metric.split("+")
    unsaid = [term for term in terms if re.fullmatch(r"(w2|cw2|jw2)(@\w+)?(:.*)?", term)]
    took = {term: "sinkhorn" for term in unsaid if "solver=" not in term}
    return {**({"solver": took} if took else {}), **env}


def _flat(env: dict) -> dict:
    solvers = {f"solver of {term}": name for term, name in env.get("solver", {}).items()}
    return {key: env[key] for key in _HOST if key in env} | solvers | env["packages"]


def _distinct(values: Iterable) -> list:
    """List distinct values in order of appearance; None, where a run noted nothing, is left out."""
    found = []
    for value in values:
        if value is not None and value not in found:
            found.append(value)
    return found


def _seconds(cell: Cell, env: dict) -> list[float | None]:
    """Compute the training time of each of a cell's phases; None where it is unknown."""
    phases = ("teacher", "student") if cell.row == ALONE else ("distilled",)
    batch_size = cell.folder.config.batch_size
    steps = {line["phase"]: line.get("step") for line in cell.folder.records}
    speeds = env.get("images_per_second", {})
    return [batch_size * (steps[p] or 0) / speeds[p] if speeds.get(p) else None for p in phases]
