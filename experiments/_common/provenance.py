"""Where a table's numbers come from: machines, versions, dates and training time. No JAX."""

import datetime
import json
from collections.abc import Iterable

from experiments._common.folder import read_metrics
from experiments._common.grid import ALONE, Cell
from experiments.common.machine import processor

_HOST = ("python", "machine", "cpu", "cores", "devices")


def of(cells: list[Cell]) -> dict:
    """The first cell's environment, what differs between cells, and training time in seconds."""
    ones = list({c.path: c for c in cells}.values())
    environments = [json.loads((c.path / "env.json").read_text()) for c in ones]
    # A run that was taken up again with other versions has those that it was begun with apart.
    every = [
        _flat({**env, **other}) for env in environments for other in ({}, *env.get("earlier", []))
    ]
    keys = _distinct(key for env in every for key in env)
    values = {key: _distinct(env.get(key) for env in every) for key in keys}
    seconds = [s for one, env in zip(ones, environments, strict=True) for s in _seconds(one, env)]
    known = [s for s in seconds if s is not None]
    here = {"cpu_recorded": "cpu" in every[0], **processor()}
    return {
        "date": datetime.date.today().isoformat(),
        "trained": sorted({date(one) for one in ones}),
        "environment": here | {key: found[0] for key, found in values.items()},
        "differ": {key: found for key, found in values.items() if len(found) > 1},
        "training_seconds": sum(known) if known else None,
        "trainings": {"timed": len(known), "all": len(seconds)},
    }


def date(cell: Cell) -> str:
    """When a cell was trained, by its last checkpoint, which says so itself and survives a copy."""
    saved = (cell.path / "checkpoints").glob("*/last/*/_CHECKPOINT_METADATA")
    times = [json.loads(file.read_text())["commit_timestamp_nsecs"] / 1e9 for file in saved]
    times = times or [(cell.path / "config.json").stat().st_mtime]
    return datetime.date.fromtimestamp(max(times)).isoformat()


def sentence(found: dict) -> str:
    """What `of` returned, for a reader: one paragraph."""
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


def _flat(env: dict) -> dict:
    return {key: env[key] for key in _HOST if key in env} | env["packages"]


def _distinct(values: Iterable) -> list:
    """In order of appearance; a run from before something was noted says nothing of it."""
    found = []
    for value in values:
        if value is not None and value not in found:
            found.append(value)
    return found


def _seconds(cell: Cell, env: dict) -> list[float | None]:
    """Of each phase that was trained in this cell, from its images a second; None if unknown."""
    phases = ("teacher", "student") if cell.row == ALONE else ("distilled",)
    batch_size = json.loads((cell.path / "config.json").read_text())["batch_size"]
    steps = {line["phase"]: line.get("step") for line in read_metrics(cell.path)}
    speeds = env.get("images_per_second", {})
    return [steps[p] * batch_size / speeds[p] if speeds.get(p) else None for p in phases]
