"""A finished run, read back."""

import json
import sys

import chex
import pytest
import tyro
from flax import nnx

from experiments import bound, digits, features, table
from experiments.analysis import bound as bounds
from experiments.analysis.finished import finished, outputs
from experiments.common import cli
from experiments.common.errors import UsageError
from experiments.runs.folder import read_metrics
from kd2m_jax import losses

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
def test_features_and_bound_of_a_finished_run(finished_run, monkeypatch, capsys):
    recorded = {r["phase"]: r for r in read_metrics(finished_run) if "test_accuracy" in r}
    flags = [f"--run={finished_run}", "--examples=450"]
    in_process(monkeypatch, features, features.Features(""), *flags)
    found = json.loads((finished_run / "features.json").read_text())
    assert found["examples"] == 450
    # The networks are those that were trained: their accuracy is the one on record.
    for name, numbers in found["networks"].items():
        expected = 100 * recorded[name]["test_accuracy"]
        assert numbers["accuracy"] == pytest.approx(expected, abs=1e-4)
    assert found["networks"]["teacher"]["w2"] == pytest.approx(0, abs=1e-4)
    run = finished(finished_run, None)
    images, labels = run.plan.dataset.test
    student, teacher = (outputs(run.trained[k], run.plan.dataset, images)
                        for k in ("student", "teacher"))  # fmt: skip
    for name, options in (("l2", {}), ("w2", {"solver": "exact"})):
        value = losses.get_metric(name, **options)(student, teacher, labels)
        assert found["networks"]["student"][name] == pytest.approx(float(value), rel=1e-5)
    assert (finished_run / "features.png").stat().st_size > 50_000

    in_process(monkeypatch, bound, bound.Bound(""), *flags[:1], "--examples=60", "--points=2")
    assert "gap <= W <= L2 holds at 6 of 6 points" in capsys.readouterr().out
    found = json.loads((finished_run / "bound.json").read_text())
    assert (finished_run / "bound.png").stat().st_size > 20_000
    for phase in ("student", "distilled"):
        points = found["points"][phase]
        assert [p["epoch"] for p in points] == [0, 1, 2]
        # Trained again it ends where the run ended, to the bit.
        end = [outputs(run.trained[k], run.plan.dataset, images[:60])
               for k in (phase, "teacher")]  # fmt: skip
        expected = bounds.measure(*end, labels[:60], found["bandwidth"])
        assert points[-1] == {"epoch": 2, **expected}
        assert points[0]["w"] != points[1]["w"]


def test_a_folder_that_is_no_finished_run(monkeypatch, capsys, tmp_path):
    for module, default in ((features, features.Features("")), (bound, bound.Bound(""))):
        with pytest.raises(SystemExit) as stop:
            in_process(monkeypatch, module, default, f"--run={tmp_path}")
        assert stop.value.code == 2
        assert "is not the folder of a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "name"), [(features, "features"), (bound, "bound")])
def test_a_run_has_to_be_named(module, name, monkeypatch, capsys):
    default = getattr(module, name.capitalize())(tyro.MISSING)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, module, default)
    assert stop.value.code == 2
    assert "--run is needed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_part_of_the_data_with_class_costs(monkeypatch, capsys, tmp_path):
    """wkd-l's costs are the trained teacher's: the bound's students end as the run's did."""
    flags = [*TINY, "--epochs=1", "--seeds=1", "--train-examples=256", f"--out={tmp_path}"]
    in_process(monkeypatch, table, table.Table(), *flags, "--metrics", "wkd-l=1")
    cell = tmp_path / "digits/seed0/wkd-l=1"
    run = finished(cell, None)
    assert len(run.plan.dataset.train[0]) == 256 and len(run.plan.dataset.test[0]) == 450
    ((_, end),) = list(bounds.over_training(run, "distilled", 1))[1:]
    states = [nnx.to_pure_dict(nnx.state(net)) for net in (end, run.trained["distilled"])]
    chex.assert_trees_all_equal(*states)
    # A folder of before train_examples was written down is the same run, and gets it.
    config = json.loads((cell / "config.json").read_text())
    old = {key: value for key, value in config.items() if key != "train_examples"}
    (cell / "config.json").write_text(json.dumps(old))
    with pytest.raises(UsageError, match="was trained on other images than those of digits"):
        finished(cell, None)
    in_process(monkeypatch, table, table.Table(), *flags, "--metrics", "wkd-l=1")
    assert json.loads((cell / "config.json").read_text()) == config
    capsys.readouterr()
    flags[-2] = "--train-examples=300"
    with pytest.raises(SystemExit):
        in_process(monkeypatch, table, table.Table(), *flags, "--metrics", "wkd-l=1")
    assert "train_examples 256 -> 300" in capsys.readouterr().err
