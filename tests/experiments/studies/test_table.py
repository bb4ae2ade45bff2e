"""experiments.table: its numbers and files."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from scipy import stats

from experiments import table
from experiments.common import cli
from experiments.runs import train
from experiments.runs.configuration import RunConfig
from experiments.runs.folder import read_metrics
from experiments.studies import table as tables
from experiments.studies.grid import Grid, cell, cells

FIELDS = [field.name for field in dataclasses.fields(RunConfig)]
CONFIG = RunConfig(**dict.fromkeys(FIELDS, 1) | {"coef": (1.0,), "published": None, "metric": "w2"})
TINY = ["--teacher=mlp-8-4", "--student=mlp-6-4", "--batch-size=64", "--max-steps=3"]


def in_process(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments.table", *flags])
    cli.main(table.Table(), table.run, module="experiments.table", description="")


def test_a_table_over_two_seeds_and_again(monkeypatch, capsys, tmp_path):
    flags = [*TINY, f"--out={tmp_path}", "--seeds=2", "--metrics", "l2"]
    in_process(monkeypatch, *flags)
    assert "4/4" in capsys.readouterr().err  # the progress bar
    before = {p: p.read_text() for p in tmp_path.rglob("metrics.jsonl")}

    # Once more with one metric more: nothing that is there is trained again.
    trained = []
    fit = train.fit

    def counting(network, data, **options):
        trained.append(not any(options["checkpoint_dir"].glob("last/*")))
        return fit(network, data, **options)

    monkeypatch.setattr(train, "fit", counting)
    in_process(monkeypatch, *flags, "kd=0.9")
    assert sum(trained) == 2  # its distilled student, for each seed
    assert len(before) == 4 and {p: p.read_text() for p in before} == before
    found = json.loads((tmp_path / "table.json").read_text())["datasets"]["digits"]
    assert found["examples"] == {"train": 1347, "test": 450}
    assert list(found["rows"]) == ["teacher", "none", "l2", "kd=0.9"]

    # Every number is that of the run folders, paired by seed.
    def accuracies(cell, phase):
        folders = [tmp_path / "digits" / f"seed{k}" / cell for k in range(2)]
        lines = [[r for r in read_metrics(f) if r["phase"] == phase] for f in folders]
        return np.array([100 * records[-1]["test_accuracy"] for records in lines])

    alone, l2 = accuracies("none", "student"), accuracies("l2", "distilled")
    rows = found["rows"]
    assert rows["l2"]["last"]["mean"] == pytest.approx(l2.mean())
    assert rows["l2"]["last"]["sd"] == pytest.approx(l2.std(ddof=1))
    assert rows["none"]["last"]["values"] == pytest.approx(alone)
    assert rows["l2"]["difference"]["mean"] == pytest.approx((l2 - alone).mean())
    expected = stats.ttest_rel(accuracies("kd=0.9", "distilled"), alone)
    assert rows["kd=0.9"]["difference"]["p"] == pytest.approx(expected.pvalue)
    assert rows["teacher"]["last"]["values"] == pytest.approx(accuracies("l2", "teacher"))

    # One teacher and one student alone a seed; the cells have lambda as they should.
    for seed in ("seed0", "seed1"):
        assert len(list((tmp_path / "digits" / seed / "teachers").iterdir())) == 1
    students = sorted(p.parts[-3] for p in tmp_path.glob("digits/*/*/checkpoints/student"))
    assert students == ["none", "none"]
    config = json.loads((tmp_path / "digits/seed1/kd=0.9/config.json").read_text())
    assert (config["coef"], config["seed"]) == ([0.9], 1)

    for name, words in {
        "table.md": (
            "student alone",
            "450 test examples",
            "--seeds=2",
            "95% t-intervals",
            "(Holm)",
        ),
        "table.tex": ("\\toprule", "\\bottomrule", "$\\pm"[1:], "student alone"),
    }.items():
        text = (tmp_path / name).read_text()
        assert [word for word in words if word not in text] == []
        assert "published" not in text
    assert (tmp_path / "table.png").stat().st_size > 10_000
    assert "not distinguishable from the student alone" in capsys.readouterr().out


def test_one_seed_has_no_interval(monkeypatch, capsys, tmp_path):
    in_process(monkeypatch, *TINY, f"--out={tmp_path}", "--seeds=1", "--metrics", "l2")
    assert "unknown" in capsys.readouterr().out
    row = json.loads((tmp_path / "table.json").read_text())["datasets"]["digits"]["rows"]["l2"]
    assert row["last"]["sd"] is None and row["difference"]["interval"] is None


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


def test_published_numbers_and_the_average(tmp_path):
    """Three data sets from written run folders, without training."""
    grid = Grid(seeds=2, out=str(tmp_path))
    names = ("svhn", "cifar10", "cifar100")
    ones = [cell(grid, d, m, s) for d in names for s in range(2) for m in ("none", "w2")]
    for i, one in enumerate(ones):
        written(one, 0.5 + 0.01 * i)
    text = tables.write(tmp_path, ones, {name: {"train": 9, "test": 9} for name in names})
    assert "average" in text and "80.51" in text  # W2's published average
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["datasets"]["cifar10"]["rows"]["w2"]["published"] == 86.45
    rows = found["average"]["rows"]
    # Cells in order: data set by data set, none and w2 of seed 0, then of seed 1.
    expected = [60 + np.mean([1, 5, 9]), 60 + np.mean([3, 7, 11])]
    assert rows["w2"]["last"]["values"] == pytest.approx(expected)
    published = {name: round(row["published"], 2) for name, row in rows.items()}
    assert published == {"teacher": 81.20, "none": 78.29, "w2": 80.51}
    assert "one seed" in (tmp_path / "table.md").read_text()
    assert "published" in (tmp_path / "table.tex").read_text()


def test_data_sets_with_one_lambda_share_their_rows(tmp_path):
    """1e-3 is the main's own on digits and not on cifar10: folders differ, rows do not."""
    ones = cells(Grid(1, out=str(tmp_path)), ("digits", "cifar10"), ("cw2", "kd=0.9"), "1e-3")
    assert [one.folder.path.name for one in ones] == [
        "none",
        "cw2",
        "kd=0.9",
        "none",
        "cw2=0.001",
        "kd=0.9",
    ]
    for one in ones:
        written(one, 0.5)
    text, found = tabled(tmp_path, ones)
    for name, published in (("digits", None), ("cifar10", 86.54)):
        rows = found["datasets"][name]["rows"]
        assert list(rows) == ["teacher", "none", "cw2", "kd=0.9"]
        assert [row["coef"] for row in rows.values()] == [None, None, "0.001", "0.9"]
        assert rows["cw2"]["published"] == published
        assert found["datasets"][name]["config"]["task_coef"] == 1
    assert list(found["average"]["rows"]) == ["teacher", "none", "cw2", "kd=0.9"]
    assert "weight of the labels 1" in text


def test_one_diverged_seed_leaves_its_pair_out(tmp_path):
    ones = cells(Grid(3, out=str(tmp_path)), ("digits",), ("w2",))
    for i, one in enumerate(ones):
        written(one, 0.5 + 0.01 * i)
    (ones[3].folder.path / "diverged.json").write_text('{"step": 12}')
    text, found = tabled(tmp_path, ones)
    row = found["datasets"]["digits"]["rows"]["w2"]
    assert row["last"]["values"] == pytest.approx([61, None, 65]) and row["diverged"] == {"1": 12}
    assert row["difference"]["mean"] == pytest.approx(1)
    assert "(2 seeds)" in text and "w2, seed 1 at step 12" in text
