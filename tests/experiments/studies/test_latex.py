"""A table in LaTeX."""

import dataclasses
import json

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


def test_latex_has_its_minus_signs_and_escapes(tmp_path):
    ones = cells(Grid(2, out=str(tmp_path)), ("svhn",), ("jw2:label_cost=kl", "w2"))
    for one in ones:
        written(one, 0.5 - 0.01 * (one.seed + 1) * (one.row != "none"))
    tabled(tmp_path, ones)
    text = (tmp_path / "table.tex").read_text()
    body = text[text.index("\\toprule") :]
    assert "jw2:label\\_cost=kl & $58.50$ $\\pm$ $0.71$ & $-1.50$ [$-7.85$, $+4.85$]" in body
    assert "\\multicolumn{3}{l}{\\emph{published" in body
