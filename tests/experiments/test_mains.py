"""The other mains, each through its own data set's path, on small fake archives."""

import json
import sys

import pytest
from archives import fake_archives, register

from experiments import cifar, mnist, svhn
from experiments._common import cli
from experiments._common.folder import read_metrics

MAINS = [("cifar10", cifar, []), ("cifar100", cifar, ["--dataset=cifar100"])]
MAINS += [("svhn", svhn, []), ("mnist", mnist, [])]
TINY = ["--teacher=mlp-8-4", "--student=mlp-6-4", "--batch-size=8", "--max-steps=3"]


@pytest.mark.parametrize(("name", "module", "flags"), MAINS)
def test_a_main_trains_on_its_data_set(name, module, flags, monkeypatch, capsys, tmp_path):
    fake_archives(name, tmp_path / "data/downloads/manual")
    register(monkeypatch, name, tmp_path / "data/downloads/manual")
    folders = [f"--data-dir={tmp_path / 'data'}", f"--out={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["main", *flags, *TINY, *folders])
    cli.main(module.DEFAULTS, module.run, module="main", description=module.__doc__)
    assert "distilled student" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset"] == name
    assert {line["phase"] for line in read_metrics(tmp_path / "run")} == {
        "teacher",
        "student",
        "distilled",
    }


def test_data_that_is_not_there_is_status_2_with_both_ways_out(monkeypatch, capsys, tmp_path):
    """Offline for real: this address answers nobody."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(
        sys, "argv", ["main", f"--data-dir={tmp_path}", f"--out={tmp_path / 'run'}"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(cifar.DEFAULTS, cifar.run, module="experiments.cifar", description="")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "python -m experiments.digits" in error and "experiments.cifar" in error
    assert "Traceback" not in error
