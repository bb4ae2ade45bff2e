"""The main of the bench: what it prints, writes and refuses."""

import json
import pathlib
import sys
import types

import jax
import pytest

from experiments.bench import __main__ as main
from experiments.bench import losses as loss_suites
from experiments.common import cli


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments.bench", *flags])
    cli.main(main.Bench(), main.run, module="experiments.bench", description="")


def test_the_main_prints_and_writes(monkeypatch, capsys, tmp_path):
    rows, notes = [{"metric": "w2", "ms": 1.0}], ["a note"]
    monkeypatch.setattr(loss_suites, "classes", lambda out, repeats: (rows, notes))
    stub = types.ModuleType("population")
    stub.population = lambda out: (rows, notes)
    monkeypatch.setitem(sys.modules, "experiments.bench.population", stub)
    command(monkeypatch, "--suite=population", f"--out={tmp_path}")
    assert json.loads((tmp_path / "population.json").read_text())["rows"] == rows
    command(monkeypatch, "--suite=classes", "--repeats=1", f"--out={tmp_path}")
    assert "metric" in (printed := capsys.readouterr().out) and "a note" in printed
    written = json.loads((tmp_path / "classes.json").read_text())
    assert (written["rows"], written["notes"]) == (rows, notes)
    assert written["versions"]["jax"] == jax.__version__
    assert {"date", "machine", "cores", "python"} <= written.keys()
    assert written["devices"] == ["cpu"] * jax.device_count()
    if pathlib.Path("/proc/cpuinfo").exists():
        assert written["processor"] in pathlib.Path("/proc/cpuinfo").read_text()
    assert written["float32 products"]["jax"] == "default"


def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys):
    for flags in (["--repeats=0"], ["--suite=peer"], ["--suite=gpu-step"]):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *flags)
        assert stop.value.code == 2
        assert "Traceback" not in (error := capsys.readouterr().err) and error
