"""experiments.table: its cells, what it reuses, what it writes, and what it refuses."""

import dataclasses
import json
import os
import signal
import sys

import chex
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from experiments import table
from experiments.analysis.finished import finished
from experiments.common import cli
from experiments.runs import train
from experiments.runs.configuration import RunConfig
from experiments.runs.folder import read_metrics
from experiments.studies import table as tables
from experiments.studies.grid import Grid, cell, cells

FIELDS = [field.name for field in dataclasses.fields(RunConfig)]
CONFIG = RunConfig(**dict.fromkeys(FIELDS, 1) | {"coef": (1.0,), "published": None})
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
        ("kd+cw2=0.5", "kd+cw2", "0.5,0.5"),
        ("kd+cw2=auto:0.3", "kd+cw2", "auto:0.3"),  # no number, so not one for each term
        ("kd+cw2=published", "kd+cw2", "published"),
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
    assert str(digits.folder.path) == "somewhere/digits/seed3/cw2"
    # One folder for one lambda, however it is written; the main's has none in its name.
    assert cell(grid, "digits", "cw2=1e-3", 3).folder == digits.folder
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
        (["--dataset"], "--dataset needs a data set"),
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


def test_a_metric_written_twice_is_one_row_where_no_data_set_tells_them_apart():
    metrics = ("cw2", "cw2=1e-3", "CW2")
    rows = [one.row for one in cells(Grid(1), ("digits",), metrics)]
    assert rows == ["none", "cw2"]
    rows = [one.row for one in cells(Grid(1), ("digits", "cifar10"), metrics)]
    assert rows == 2 * ["none", "cw2", "cw2=1e-3"]


def test_a_table_tells_where_its_numbers_come_from(tmp_path):
    ones = cells(Grid(2, out=str(tmp_path)), ("digits",), ("w2",))
    host = {"cpu": "A CPU", "cores": 7, "python": "3.11", "machine": "x", "devices": ["cpu"]}
    versions = [{"packages": {"jax": "1", "numpy": n}} for n in ("2", "2", "3", "2")]
    versions[1]["earlier"] = [{"packages": {"jax": "0", "numpy": "2"}}]
    speeds = [{"teacher": 10, "student": 50}, {"distilled": 5}, {"teacher": 10}, {"distilled": 5}]
    for one, version, speed in zip(ones, versions, speeds, strict=True):
        written(one, 0.5, images_per_second=speed, **host, **version)
        os.utime(one.folder.path / "config.json", (86400 * (100 + one.seed),) * 2)
    found = tabled(tmp_path, ones)[1]
    assert found["environment"]["cpu"] == "A CPU" and found["environment"]["cores"] == 7
    assert found["differ"] == {"jax": ["1", "0"], "numpy": ["2", "3"]}
    # Batches of one, 500 steps: 500 / 10 + 500 / 50 + 500 / 5 and the same without the student.
    assert found["training_seconds"] == 160 + 150
    assert found["trainings"] == {"timed": 5, "all": 6}
    assert found["datasets"]["digits"]["rows"]["w2"]["dates"] == ["1970-04-11", "1970-04-12"]
    text = (tmp_path / "table.md").read_text()
    for words in ("Machine: A CPU, 7 cores", "1970-04-11 to 1970-04-12", "0:05:10", "for 1 of 6",
                  "jax: 1, 0; numpy: 2, 3"):  # fmt: skip
        assert words in text


def test_latex_has_its_minus_signs_and_escapes(tmp_path):
    ones = cells(Grid(2, out=str(tmp_path)), ("svhn",), ("jw2:label_cost=kl", "w2"))
    for one in ones:
        written(one, 0.5 - 0.01 * (one.seed + 1) * (one.row != "none"))
    tabled(tmp_path, ones)
    text = (tmp_path / "table.tex").read_text()
    body = text[text.index("\\toprule") :]
    assert "jw2:label\\_cost=kl & $58.50$ $\\pm$ $0.71$ & $-1.50$ [$-7.85$, $+4.85$]" in body
    assert "\\multicolumn{3}{l}{\\emph{published" in body


def test_a_run_that_diverges_is_noted_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    flags = [*TINY, f"--out={tmp_path}", "--seeds=1", "--metrics", "l2=1e38", "kd=0.9"]
    in_process(monkeypatch, *flags)
    said = capsys.readouterr().out
    assert "Diverged, and left out of their rows' means and of all differences: l2=1e38" in said
    rows = json.loads((tmp_path / "table.json").read_text())["datasets"]["digits"]["rows"]
    step = json.loads((tmp_path / "digits/seed0/l2=1e+38/diverged.json").read_text())["step"]
    assert rows["l2=1e38"]["diverged"] == {"0": step} and 1 <= step <= 3
    assert rows["l2=1e38"]["last"]["mean"] is None and rows["l2=1e38"]["last"]["values"] == [None]
    assert rows["kd=0.9"]["difference"]["mean"] is not None
    # Nothing is tried again.
    monkeypatch.setattr(train, "fit", None)
    in_process(monkeypatch, *flags)
    assert "diverged" in (tmp_path / "table.md").read_text()


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


def test_a_table_that_is_stopped_goes_on_where_it_was(monkeypatch, capsys, tmp_path):
    flags = [*TINY, f"--out={tmp_path}", "--seeds=1", "--metrics", "l2"]
    fit = train.fit

    def stopping(network, data, **options):
        if "metric" in options:  # the second cell

            def stop(record):
                os.kill(os.getpid(), signal.SIGTERM)

            options["callbacks"] = [*options["callbacks"], stop]
        return fit(network, data, **options)

    monkeypatch.setattr(train, "fit", stopping)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *flags, "--epochs=2", "--max-steps=30")
    assert stop.value.code == 128 + signal.SIGTERM
    assert "the same command continues" in capsys.readouterr().err
    first = tmp_path / "digits/seed0/none"
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    assert not (tmp_path / "table.json").exists()
    monkeypatch.setattr(train, "fit", fit)
    in_process(monkeypatch, *flags, "--epochs=2", "--max-steps=30")
    after = {p: p.stat().st_mtime_ns for p in before}
    changed = {p.name for p in before if after[p] != before[p]}
    assert changed <= {".lock", "config.json"}
    lines = read_metrics(tmp_path / "digits/seed0/l2")
    assert [r["step"] for r in lines if r["phase"] == "distilled"][-1] == 30


def test_lambda_0_is_the_student_alone_to_the_bit(monkeypatch, tmp_path):
    """The same initialisation and the same batches, which is what pairing by seed rests on."""
    in_process(monkeypatch, *TINY[:-1], f"--out={tmp_path}", "--seeds=1", "--epochs=1",
               "--metrics", "l2=0")  # fmt: skip
    trained = finished(tmp_path / "digits/seed0/l2=0", None).trained
    states = [nnx.to_pure_dict(nnx.state(trained[k])) for k in ("student", "distilled")]
    chex.assert_trees_all_equal(*states)
    alone, distilled = (
        [{k: r[k] for k in ("task_loss", "train_accuracy")} for r in read_metrics(folder)
         if r["phase"] == phase]
        for folder, phase in ((tmp_path / "digits/seed0/none", "student"),
                              (tmp_path / "digits/seed0/l2=0", "distilled"))
    )  # fmt: skip
    assert alone == distilled and len(alone) > 1


def test_a_cell_with_the_published_weights_is_reused(monkeypatch, tmp_path):
    flags = [*TINY, f"--out={tmp_path}", "--seeds=1", "--metrics", "kd=published"]
    in_process(monkeypatch, *flags)
    monkeypatch.setattr(train, "fit", None)
    in_process(monkeypatch, *flags)
    rows = json.loads((tmp_path / "table.json").read_text())["datasets"]["digits"]["rows"]
    assert rows["kd=published"]["coef"] == "published"
