"""The run folder: its lock, its environment, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from experiments import digits
from experiments.common import cli
from experiments.runs.folder import RunFolder
from kd2m_jax.internal import locked

SMALL = ["--teacher=mlp-32-16", "--student=mlp-8-16", "--epochs=6", "--batch-size=256"]


def in_process(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments.digits", *flags])
    cli.main(digits.DEFAULTS, digits.run, module="experiments.digits", description="")


@pytest.mark.parametrize("denied", [".lock", ".training"])
def test_a_folder_that_cannot_be_written_is_one_line(denied, monkeypatch, capsys, tmp_path):
    """The run folder, and the teachers' beside it; for root no folder is closed, so as if."""
    opened = Path.open

    def open_(path, *arguments, **options):
        if path.name == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, f"--out={tmp_path / 'run'}", "--max-steps=1", *SMALL)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    folder = tmp_path / ("run" if denied == ".lock" else "teachers")
    assert error.startswith(f"error: {folder}") and "cannot be written (Permission denied)" in error


def test_a_second_run_in_the_same_folder_is_refused(monkeypatch, capsys, tmp_path):
    with locked(tmp_path / "run" / ".lock"), pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, f"--out={tmp_path / 'run'}", "--max-steps=1", *SMALL)
    assert stop.value.code == 2
    assert "is in use by another process" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_out_that_is_a_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, f"--out={tmp_path / 'file'}", "--max-steps=1", *SMALL)
    assert stop.value.code == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_versions_that_are_no_longer_recorded_are_kept_as_earlier(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_environment(devices=["cpu"], backend="cpu")
    folder.write_environment(devices=["cpu"])
    assert json.loads((tmp_path / "env.json").read_text())["earlier"] == [{"backend": "cpu"}]


def test_other_compiler_settings_are_said_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    folder = RunFolder(tmp_path)
    folder.write_environment(devices=["cpu"])
    folder.write_environment(devices=["cpu"])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("XLA_FLAGS", "--xla_some=1")
    folder.write_environment(devices=["cpu"])
    assert "other compiler settings (none, now --xla_some=1)" in capsys.readouterr().out
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["xla_flags"] == ["--xla_some=1"] and env["earlier"] == [{"xla_flags": []}]
