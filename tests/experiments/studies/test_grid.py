"""The cells of a study: names, folders, settings, mistakes."""

import sys

import pytest

from experiments import table
from experiments.common import cli
from experiments.studies.grid import Grid, cell, cells


def in_process(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments.table", *flags])
    cli.main(table.Table(), table.run, module="experiments.table", description="")


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


def test_a_metric_written_twice_is_one_row_where_no_data_set_tells_them_apart():
    metrics = ("cw2", "cw2=1e-3", "CW2")
    rows = [one.row for one in cells(Grid(1), ("digits",), metrics)]
    assert rows == ["none", "cw2"]
    rows = [one.row for one in cells(Grid(1), ("digits", "cifar10"), metrics)]
    assert rows == 2 * ["none", "cw2", "cw2=1e-3"]
