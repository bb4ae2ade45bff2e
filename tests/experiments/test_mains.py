"""The other mains, each through its own data set's path, on small fake archives."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from archives import fake_archives, register
from torch_files import torch_state, write_safetensors

from experiments import cifar, mnist, svhn
from experiments.common import cli
from experiments.runs.folder import read_metrics

MAINS = [("cifar10", cifar, []), ("cifar100", cifar, ["--dataset=cifar100"])]
MAINS += [("svhn", svhn, []), ("mnist", mnist, [])]
ROOT = Path(__file__).parents[2]
TINY = ["--teacher=mlp-8-4", "--student=mlp-6-4", "--batch-size=8", "--max-steps=3"]


# The others differ in their data sets alone, which tests/experiments/data reads.
slow = [pytest.param(*main, marks=pytest.mark.slow) for main in MAINS[1:]]


@pytest.mark.parametrize(("name", "module", "flags"), [MAINS[0], *slow])
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


def test_data_that_is_not_there_is_status_2_with_both_ways_out(tmp_path):
    """Offline for real, as a process of its own: this address answers nobody."""
    dead = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"),
                         "http://127.0.0.1:9")  # fmt: skip
    command = [sys.executable, "-m", "experiments.cifar", f"--data-dir={tmp_path}"]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**os.environ, **dead},
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - begin < 30
    assert done.returncode == 2
    assert "python -m experiments.digits" in done.stderr and "experiments.cifar" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*"))  # and nothing is left behind


def cifar_run(monkeypatch, tmp_path, name, *flags):
    """On a small fake CIFAR-10, in this process; returns the run folder."""
    manual = tmp_path / "data/downloads/manual"
    if not manual.exists():
        fake_archives("cifar10", manual)
    register(monkeypatch, "cifar10", manual)
    folders = [f"--data-dir={tmp_path / 'data'}", f"--out={tmp_path / name}"]
    monkeypatch.setattr(sys, "argv", ["main", *TINY, *folders, *flags])
    cli.main(cifar.DEFAULTS, cifar.run, module="main", description="")
    return tmp_path / name


@pytest.mark.slow
def test_convolutional_networks_with_augmentation(monkeypatch, tmp_path):
    networks = ["--teacher=resnet8", "--student=resnet8", "--metric=cw2", "--coef=1"]
    run = cifar_run(monkeypatch, tmp_path, "run", *networks)
    lines = {line["phase"]: line for line in read_metrics(run)}
    assert all(np.isfinite(line["loss"]) and line["step"] == 3 for line in lines.values())
    assert lines["distilled"]["distillation_loss"] > 0


@pytest.mark.slow
def test_bfloat16_computes_in_it_and_keeps_float32(monkeypatch, capsys, tmp_path):
    losses = {}
    for precision in ("f32", "bf16"):
        run = cifar_run(monkeypatch, tmp_path, precision, f"--precision={precision}")
        losses[precision] = np.array([line["loss"] for line in read_metrics(run)])
        metadata = (run / "checkpoints/student/last/3/record/metadata").read_text()
        assert "float32" in metadata and "bfloat16" not in metadata
    assert (losses["bf16"] != losses["f32"]).all()  # rounded ...
    np.testing.assert_allclose(losses["bf16"], losses["f32"], rtol=0.05)  # ... to 8 bits


@pytest.mark.slow
def test_torch_weights_from_the_command_line(monkeypatch, capsys, tmp_path):
    file = tmp_path / "resnet18.safetensors"
    write_safetensors(file, torch_state("resnet18", num_classes=1000, stem="imagenet"))
    pretrained = ["--teacher=resnet18", "--stem=imagenet", f"--pretrained-teacher={file}"]
    run = cifar_run(monkeypatch, tmp_path, "run", *pretrained, "--max-steps=1")
    config = json.loads((run / "config.json").read_text())
    assert config["pretrained_teacher"] == str(file) and len(config["teacher_sha256"]) == 16
    # The same path with other weights in it is another teacher.
    state = torch_state("resnet18", num_classes=1000, stem="imagenet")
    write_safetensors(file, state | {"fc.bias": state["fc.bias"] + 1})
    cifar_run(monkeypatch, tmp_path, "other", *pretrained, "--max-steps=1")
    assert len(list((tmp_path / "teachers").iterdir())) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cifar_run(monkeypatch, tmp_path, "third", *pretrained, "--stem=cifar")
    assert stop.value.code == 2 and "--stem=imagenet" in capsys.readouterr().err
