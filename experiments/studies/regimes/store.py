"""The numbers of one data set in one regime: a JSON file that grows row by row, seed by seed."""

import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from ...common import files, machine
from ...common.errors import UsageError

PACKAGES = ("kd2m-jax", "jax", "jaxlib", "flax", "optax", "ott-jax", "numpy", "scipy")


class Store:
    """Found numbers, on disk after each of them, so that a stopped study goes on.

    Attributes:
      path: the file.
      content: what it holds: "about", and "rows", by row and seed what `labelled.trained` returned.
    """

    def __init__(self, path: pathlib.Path, about: dict[str, Any], order: Sequence[str]):
        """Open a file, or begin one; UsageError where it is of another study.

        ``order`` is that of the rows in the file, however they are added.
        """
        self.path, self.order = path, order
        # As JSON gives it back: with lists for tuples.
        about = json.loads(json.dumps(about))
        environment = machine.host() | _accelerator() | {"packages": machine.versions(PACKAGES)}
        if path.exists():
            try:
                self.content = files.read_object(path)
            except ValueError as error:
                raise UsageError(
                    f"{path} cannot be read ({error}): delete it to begin anew"
                ) from None
            if self.content.get("about") != about:
                raise UsageError(f"{path} is of another study: name another --out, or delete it")
            if environment not in [self.content["environment"], *self.content.get("also", [])]:
                self.content.setdefault("also", []).append(environment)
        else:
            self.content = {"about": about, "environment": environment, "dates": [], "rows": {}}

    def has(self, row: str, seed: int) -> bool:
        """Tell whether a row's numbers of a seed are there."""
        return str(seed) in self.content["rows"].get(row, {})

    def put(self, row: str, seed: int, found: dict[str, Any]) -> None:
        """Keep a row's numbers of a seed, on disk."""
        assert row in self.order, row
        rows = self.content["rows"]
        rows.setdefault(row, {})[str(seed)] = found
        self.content["rows"] = {name: rows[name] for name in self.order if name in rows}
        today = datetime.date.today().isoformat()
        if today not in self.content["dates"]:
            self.content["dates"].append(today)
        files.write(self.path, _text(self.content))


def _accelerator() -> dict[str, str]:
    """Name the device that trains, where it is not the processor."""
    device = jax.devices()[0]
    return {} if device.platform == "cpu" else {"accelerator": device.device_kind}


def _text(content: dict[str, Any]) -> str:
    """Write JSON with one line per row and seed, so that a diff shows what was found."""
    head = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=1)
    rows = [
        f"  {json.dumps(row)}: {{\n"
        + ",\n".join(f"   {json.dumps(seed)}: {json.dumps(found)}" for seed, found in seeds.items())
        + "\n  }"
        for row, seeds in content["rows"].items()
    ]
    return head[:-2] + ',\n "rows": {\n' + ",\n".join(rows) + "\n }\n}\n"
