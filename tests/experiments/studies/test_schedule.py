"""What a table trains, reuses, notes and refuses."""

import json
import os
import signal
import sys

import chex
import pytest
from flax import nnx

from experiments import table
from experiments.analysis.finished import finished
from experiments.common import cli
from experiments.runs import train
from experiments.runs.folder import read_metrics

TINY = ["--teacher=mlp-8-4", "--student=mlp-6-4", "--batch-size=64", "--max-steps=3"]


def in_process(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments.table", *flags])
    cli.main(table.Table(), table.run, module="experiments.table", description="")


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


def test_a_table_that_is_stopped_goes_on_where_it_was(monkeypatch, capsys, tmp_path):
    flags = [*TINY[:-1], f"--out={tmp_path}", "--seeds=1", "--metrics", "l2"]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_cell_with_the_published_weights_is_reused(monkeypatch, tmp_path):
    flags = [*TINY, f"--out={tmp_path}", "--seeds=1", "--metrics", "kd=published"]
    in_process(monkeypatch, *flags)
    monkeypatch.setattr(train, "fit", None)
    in_process(monkeypatch, *flags)
    rows = json.loads((tmp_path / "table.json").read_text())["datasets"]["digits"]["rows"]
    assert rows["kd=published"]["coef"] == "published"
