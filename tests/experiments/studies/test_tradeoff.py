"""experiments.tradeoff: lambdas beside one another, and what it refuses."""

import json
import sys

import numpy as np
import pytest

from experiments import digits, tradeoff
from experiments.common import cli
from experiments.runs.folder import read_metrics
from experiments.studies import tradeoff as studies

TINY = ["--teacher=mlp-8-4", "--student=mlp-6-4", "--batch-size=64"]


def in_process(monkeypatch, module, default, *flags):
    monkeypatch.setattr(sys, "argv", ["main", *map(str, flags)])
    cli.main(default, module.run, module="main", description="")


@pytest.fixture
def finished_run(monkeypatch, tmp_path):
    """Make a run of two epochs: 42 steps."""
    run = tmp_path / "run"
    in_process(monkeypatch, digits, digits.DEFAULTS, *TINY, "--epochs=2", "--metric=l2",
               "--coef=auto:0.2", f"--out={run}")  # fmt: skip
    return run


@pytest.mark.slow
def test_the_tradeoff_over_two_lambdas_and_auto(monkeypatch, capsys, tmp_path):
    flags = [*TINY, "--max-steps=3", "--seeds=2", "--metric=l2", f"--out={tmp_path}"]
    default = tradeoff.Tradeoff()
    in_process(monkeypatch, tradeoff, default, *flags, "--coefs", "1", "auto:0.3")
    found = json.loads((tmp_path / "tradeoff-digits-l2.json").read_text())
    assert list(found["coefs"]) == ["1", "auto:0.3"]
    for coef, folder in (("1", "l2=1"), ("auto:0.3", "l2=auto-0.3")):
        runs = [read_metrics(tmp_path / "digits" / f"seed{k}" / folder) for k in range(2)]
        last = [[line for line in lines if line["phase"] == "distilled"][-1] for lines in runs]
        mean = {key: np.mean([line[key] for line in last]) for key in last[0] if key != "phase"}
        row = found["coefs"][coef]
        assert row["accuracy"]["mean"] == pytest.approx(100 * mean["test_accuracy"])
        assert row["task_loss"]["mean"] == pytest.approx(mean["task_loss"])
        assert row["distillation_loss"]["mean"] == pytest.approx(mean["distillation_loss"])
        geometric = np.exp(np.mean([np.log(line["coef"]) for line in last]))
        assert row["lambda"] == pytest.approx(geometric)
    assert found["coefs"]["1"]["lambda"] == pytest.approx(1)
    assert (tmp_path / "tradeoff-digits-l2.png").stat().st_size > 10_000
    text = (tmp_path / "tradeoff-digits-l2.md").read_text()
    assert "| 1 |" in text and "| auto:0.3 (" in text and "Holm" in text
    with pytest.raises(SystemExit):
        in_process(monkeypatch, tradeoff, default, *flags, "--coefs", "0")
    assert "--coefs must be > 0" in capsys.readouterr().err


def test_a_run_with_auto_records_lambda(finished_run):
    assert json.loads((finished_run / "config.json").read_text())["coef"] == ["auto:0.2"]
    found = [r["coef"] for r in read_metrics(finished_run) if r["phase"] == "distilled"]
    assert min(found) > 0 and len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coef=auto:x"], "--coef: coef must be a number >= 0"),
        (["--coef=automatic"], "'auto:RATIO' with RATIO > 0, got 'automatic'"),
        (["--coef=auto", "--task-coef=0"], "--coef=auto follows the cross-entropy"),
        (["--coef=1", "--metric=kd+cw2"], "--coef needs 2 numbers for --metric=kd+cw2"),
    ],
)
def test_a_mistake_with_auto(flags, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, digits, digits.DEFAULTS, f"--out={tmp_path / 'run'}", *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric=kd+cw2"], "--metric must be one metric, for one axis of λ: not kd+cw2"),
        (["--metric=none"], "--metric must be one metric, for one axis of λ: not none"),
        (["--coefs"], "--coefs needs a λ"),
    ],
)
def test_a_tradeoff_without_an_axis(flags, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, tradeoff, tradeoff.Tradeoff(), f"--out={tmp_path / 'run'}", *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracked_lambda_of_0_or_infinity_has_no_logarithm(tmp_path):
    assert studies._geometric([0.0, 1.0, 4.0, np.inf]) == pytest.approx(2)
    assert studies._geometric([0.0]) is None
    known = {"mean": 1.0, "sd": None, "interval": None}
    row = dict.fromkeys(("accuracy", "difference", "task_loss", "distillation_loss"), known)
    row |= {"lambda": None}
    for coefs in ({"auto": row}, {"auto": row, "1": row | {"lambda": 1.0}}):
        studies._figure(tmp_path / "f.png", {"coefs": coefs, "teacher": known, "alone": known})
