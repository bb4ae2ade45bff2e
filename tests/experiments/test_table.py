"""experiments.table: its cells, what it reuses, what it writes, and what it refuses."""

import json
import sys

import numpy as np
import pytest
from scipy import stats

from experiments import table
from experiments._common import cli, train
from experiments._common.folder import read_metrics
from experiments._common.grid import Grid, cell

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
    assert "told apart" in capsys.readouterr().out


def test_a_changed_configuration_is_refused(monkeypatch, capsys, tmp_path):
    flags = [*TINY[:-1], f"--out={tmp_path}", "--seeds=1", "--metrics", "none"]
    in_process(monkeypatch, *flags, "--max-steps=1")
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *flags, "--max-steps=2")
    assert stop.value.code == 2
    assert "other settings (max_steps 1 -> 2)" in capsys.readouterr().err
    # Fewer training images are another configuration too.
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *flags, "--max-steps=1", "--train-examples=100")
    assert "data_sha256" in capsys.readouterr().err


def test_one_seed_has_no_interval(monkeypatch, capsys, tmp_path):
    in_process(monkeypatch, *TINY, f"--out={tmp_path}", "--seeds=1", "--metrics", "l2")
    assert "unknown" in capsys.readouterr().out
    row = json.loads((tmp_path / "table.json").read_text())["datasets"]["digits"]["rows"]["l2"]
    assert row["last"]["sd"] is None and row["difference"]["interval"] is None


@pytest.mark.parametrize(
    ("metric", "name", "coef"),
    [
        ("gaussian_w2", "gaussian-w2", "0.001"),
        ("w2@logits=2", "w2@logits", "2"),
        ("jw2:label_cost=kl", "jw2:label_cost=kl", "0.001"),
        ("jw2:label_cost=kl:beta=0.5=1e-2", "jw2:label_cost=kl:beta=0.5", "0.01"),
        ("kd:temperature=2+cw2=0.9,1e-3", "kd:temperature=2+cw2", "0.9,0.001"),
        ("cw2=auto:0.3", "cw2", "auto:0.3"),
    ],
)
def test_a_metric_is_told_from_its_lambda(metric, name, coef):
    distillation = cell(Grid(), "digits", metric, 0).settings.distillation
    assert (distillation.metric, distillation.coef) == (name, coef)


def test_cells_follow_the_main_of_their_data_set():
    grid = Grid(epochs=7, task_coef=0.5, out="somewhere")
    digits, cifar = (cell(grid, name, "cw2", 3) for name in ("digits", "cifar100"))
    assert digits.settings.networks.teacher == "resnet8"
    assert cifar.settings.networks.teacher == "resnet34"
    assert (digits.settings.distillation.coef, cifar.settings.distillation.coef) == (
        "0.001",
        "0.0001",
    )
    assert {c.settings.training.epochs for c in (digits, cifar)} == {7}
    assert digits.settings.training.seed == 3
    assert digits.settings.distillation.task_coef == 0.5
    assert str(digits.path) == "somewhere/digits/seed3/cw2"
    # One folder for one lambda, however it is written; the main's has none in its name.
    assert cell(grid, "digits", "cw2=1e-3", 3).path == digits.path
    assert cell(grid, "digits", "cw2", 3, coef="1e-2").label == "cw2=0.01"
    assert cell(grid, "digits", "kd+cw2", 0, "0.5").settings.distillation.coef == "0.5,0.5"
    # Neither lambda nor the labels' weight is a setting of the student alone.
    alone = cell(grid, "digits", "none", 3, coef="1e-2").settings
    assert alone == cell(Grid(epochs=7, out="somewhere"), "digits", "none", 3).settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "digit"], "unknown data set 'digit'"),
        (["--metrics", "w3"], "unknown metric 'w3'"),
        (
            ["--metrics", "w2=much"],
            "--coef must be numbers >= 0, got 'much'",
        ),
        (["--coef=-1"], "--coef must be a number >= 0"),
        (["--seeds=0"], "--seeds must be at least 1"),
        (["--train-examples=0"], "--train-examples must be at least 1"),
        (["--student=mlp-0"], "--student: widths must be positive"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, f"--out={tmp_path / 'run'}", "--max-steps=1", *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_published_numbers_and_the_average(tmp_path):
    """Three data sets from written run folders, without training."""
    from experiments._common import table as tables

    grid = Grid(seeds=2, out=str(tmp_path))
    names = ("svhn", "cifar10", "cifar100")
    cells = [cell(grid, d, m, s) for d in names for s in range(2) for m in ("none", "w2")]
    for i, one in enumerate(cells):
        one.path.mkdir(parents=True)
        (one.path / "config.json").write_text(json.dumps(dict.fromkeys(tables.CONFIG, 1)))
        env = {"python": "", "machine": "", "packages": {}, "devices": []}
        (one.path / "env.json").write_text(json.dumps(env))
        phases = ("teacher", "student") if one.label == "none" else ("teacher", "distilled")
        records = [{"phase": p, "test_accuracy": 0.5 + 0.01 * i + 0.1 * (p == phases[1])}
                   for p in phases]  # fmt: skip
        (one.path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = tables.write(tmp_path, cells, {name: {"train": 9, "test": 9} for name in names})
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
