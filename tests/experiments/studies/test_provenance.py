"""Where a table's numbers come from."""

import dataclasses
import json
import os

from experiments.runs.configuration import RunConfig
from experiments.studies import table as tables
from experiments.studies.grid import Grid, cells

FIELDS = [field.name for field in dataclasses.fields(RunConfig)]
CONFIG = RunConfig(**dict.fromkeys(FIELDS, 1) | {"coef": (1.0,), "published": None, "metric": "w2"})


def written(one, accuracy, **env):
    """Make a run folder without training: the teacher at this accuracy, the student 0.1 higher."""
    path = one.folder.path
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    env = {"python": "", "machine": "", "packages": {}, "devices": []} | env
    (path / "env.json").write_text(json.dumps(env))
    phases = ("teacher", "student") if one.label == "none" else ("teacher", "distilled")
    records = [{"phase": p, "step": 500, "test_accuracy": accuracy + 0.1 * (p == phases[1])}
               for p in phases]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def tabled(out, cells):
    text = tables.write(out, cells, {c.dataset: {"train": 9, "test": 9} for c in cells})
    return text, json.loads((out / "table.json").read_text())


def test_a_table_tells_where_its_numbers_come_from(tmp_path):
    ones = cells(Grid(2, out=str(tmp_path)), ("digits",), ("w2",))
    host = {"cpu": "A CPU", "cores": 7, "python": "3.11", "machine": "x", "devices": ["cpu"]}
    versions = [{"packages": {"jax": "1", "numpy": n}} for n in ("2", "2", "3", "2")]
    versions[3]["solver"] = {"w2": "exact"}  # the others were made before solvers were noted
    versions[1]["earlier"] = [{"packages": {"jax": "0", "numpy": "2"}}]
    speeds = [{"teacher": 10, "student": 50}, {"distilled": 5}, {"teacher": 10}, {"distilled": 5}]
    for one, version, speed in zip(ones, versions, speeds, strict=True):
        written(one, 0.5, images_per_second=speed, **host, **version)
        os.utime(one.folder.path / "config.json", (86400 * (100 + one.seed),) * 2)
    found = tabled(tmp_path, ones)[1]
    assert found["environment"]["cpu"] == "A CPU" and found["environment"]["cores"] == 7
    assert found["differ"] == {
        "jax": ["1", "0"], "numpy": ["2", "3"], "solver of w2": ["sinkhorn", "exact"]
    }  # fmt: skip
    # Batches of one, 500 steps: 500 / 10 + 500 / 50 + 500 / 5 and the same without the student.
    assert found["training_seconds"] == 160 + 150
    assert found["trainings"] == {"timed": 5, "all": 6}
    assert found["datasets"]["digits"]["rows"]["w2"]["dates"] == ["1970-04-11", "1970-04-12"]
    text = (tmp_path / "table.md").read_text()
    for words in ("Machine: A CPU, 7 cores", "1970-04-11 to 1970-04-12", "0:05:10", "for 1 of 6",
                  "jax: 1, 0; numpy: 2, 3"):  # fmt: skip
        assert words in text
