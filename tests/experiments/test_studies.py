"""experiments.tradeoff, features and bound, on small runs of digits."""

import json
import sys
import types

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx

from experiments import bound, digits, features, table, tradeoff
from experiments.analysis import bound as bounds
from experiments.analysis import features as embeddings
from experiments.analysis.finished import Finished, finished, outputs
from experiments.common import cli
from experiments.common.errors import UsageError
from experiments.data.specs import Dataset
from experiments.runs.folder import RunFolder, read_metrics
from experiments.studies import tradeoff as studies
from kd2m_jax import Outputs, losses, models

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


def test_the_bound_notices_what_is_out_of_order():
    rng = np.random.default_rng(0)
    z, logits = rng.normal(size=(2, 20, 4)).astype(np.float32)
    student, teacher = (Outputs(jnp.asarray(f), jnp.asarray(logits)) for f in (z + 0.3, z))
    labels = np.arange(20) % 4
    point = bounds.measure(student, teacher, labels, bounds.bandwidth(z))
    assert bounds.in_order(point)
    assert point["cross_entropy_gap"] == 0  # the same logits
    for key in ("gap", "w"):
        assert not bounds.in_order(point | {key: 2 * point["l2"]})
    # The bandwidth is the median distance, or 1.
    pairs = np.linalg.norm(z[:, None] - z, axis=2)
    assert bounds.bandwidth(z) == pytest.approx(np.median(pairs), rel=1e-4)
    assert bounds.bandwidth(0.01 * z) == 1


def test_a_folder_that_is_no_finished_run(monkeypatch, capsys, tmp_path):
    for module, default in ((features, features.Features("")), (bound, bound.Bound(""))):
        with pytest.raises(SystemExit) as stop:
            in_process(monkeypatch, module, default, f"--run={tmp_path}")
        assert stop.value.code == 2
        assert "is not the folder of a finished run" in capsys.readouterr().err


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


@pytest.mark.parametrize(("module", "name"), [(features, "features"), (bound, "bound")])
def test_a_run_has_to_be_named(module, name, monkeypatch, capsys):
    default = getattr(module, name.capitalize())(tyro.MISSING)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, module, default)
    assert stop.value.code == 2
    assert "--run STR" in capsys.readouterr().err


def test_features_take_so_many_examples_of_ten_classes(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (90, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(90) % 30  # of 30 classes, a third of each 30 images
    classes = tuple(map(str, range(30)))
    data = Dataset("x", classes, (images, labels), (images, labels), (127.0,), (60.0,), 0, False)

    def network(seed, width=4):
        widths, rngs = (8, width), nnx.Rngs(seed)
        return models.MLP(widths, 30, in_features=16, rngs=rngs)

    trained = {k: network(i) for i, k in enumerate(("teacher", "student", "distilled"))}
    run = Finished(RunFolder(tmp_path), types.SimpleNamespace(dataset=data), trained)
    embeddings.write(run, examples=25, seed=0)
    assert json.loads((tmp_path / "features.json").read_text())["examples"] == 25
    with pytest.raises(UsageError, match="as resnet20 and resnet8 do"):
        embeddings.write(run._replace(trained=trained | {"student": network(3, 5)}), 25, 0)


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
