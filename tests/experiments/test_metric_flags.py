"""--metric and --coef from the shell: options, sums, published weights, projectors."""

import json
import sys

import numpy as np
import pytest

from experiments import digits
from experiments.common import cli
from experiments.runs import build
from experiments.runs.folder import read_metrics
from kd2m_jax import losses

MLPS = ["--teacher=mlp-16-8", "--student=mlp-6-8"]
UNEQUAL = ["--teacher=mlp-16-8", "--student=mlp-6-12"]
RESNETS = ["--teacher=resnet8", "--student=resnet8"]


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """Run the main in a folder of its own; return config and the distilled student's lines."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, steps=3):
        monkeypatch.setattr(sys, "argv", ["digits", f"--max-steps={steps}", *flags])
        cli.main(digits.DEFAULTS, digits.run, module="experiments.digits", description="")
        path = max((tmp_path / "runs").glob("digits-*"), key=lambda p: p.stat().st_mtime)
        lines = [line for line in read_metrics(path) if line["phase"] == "distilled"]
        return json.loads((path / "config.json").read_text()), lines

    return run


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("jw2:label_cost=kl", "jw2:label_cost=kl"),
        pytest.param("W2:debiased=False", "w2:debiased=False", marks=pytest.mark.slow),
    ],
)
def test_options_keep_their_underscores_and_capitals(written, kept, shell):
    config, lines = shell(f"--metric={written}", *MLPS, steps=1)
    assert config["metric"] == kept
    assert losses.get_metric(kept) == losses.get_metric(written)
    assert np.isfinite(lines[-1]["distillation_loss"])


def test_published_weights(shell):
    config, lines = shell("--metric=kd", "--coef=published", *MLPS)
    assert config["coef"] == ["published"] and config["task_coef"] == 0.1
    assert config["published"] == {"coef": 0.9, "task_coef": 0.1, "decay_from": 1.0}
    total = 0.1 * lines[-1]["task_loss"] + 0.9 * lines[-1]["distillation_loss"]
    assert lines[-1]["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_auto_weighs_a_sum_as_one(shell):
    config, lines = shell("--metric=kd+cw2", "--coef=auto:0.2", *MLPS)
    assert config["coef"] == ["auto:0.2"]
    last = lines[-1]
    parts = last["distillation_loss/kd"] + last["distillation_loss/cw2"]
    assert last["distillation_loss"] == pytest.approx(parts, rel=1e-5)
    assert last["coef"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric=w2", "--coef=published"], "w2 has no published weights: kd, nst, wkd-l, wkd-f"),
        (["--metric=kd+nst", "--coef=published"], "kd+nst has no published weights"),
        (["--metric=kd", "--coef=published", "--task-coef=0.5"], "brings its own weight of the"),
        (["--metric=cw2+nst", *UNEQUAL, "--coef=1,1"], "--metric=cw2+nst: metric 'nst' needs"),
        (["--metric=wkd-f:grid=3", *RESNETS], "grid=3 must divide maps_s' height and width"),
        (["--metric=nst:stages=7", *RESNETS], "has 3 stages, so there is no stage 7"),
        (["--metric=w2:debiased=no"], "debiased must be true or false, got no"),
    ],
)
def test_a_mistake_is_seen_before_anything_is_trained(flags, message, shell, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        shell(*flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_wkd_l_from_the_shell(shell, monkeypatch):
    _, lines = shell("--metric=wkd-l", *MLPS)
    monkeypatch.setattr(build, "with_class_cost", lambda metric, teacher, data: metric)
    _, uniform = shell("--metric=wkd-l", *MLPS)
    assert lines[-1]["step"] == uniform[-1]["step"] == 3
    found, other = (each[0]["distillation_loss"] for each in (lines, uniform))
    assert found != pytest.approx(other, rel=0.03)


@pytest.mark.slow
def test_metrics_on_logits_and_in_unequal_spaces_take_no_projector(shell, capsys):
    for metric in ("w2@logits", "gw2"):
        config, lines = shell(f"--metric={metric}", *UNEQUAL)
        assert config["metric"] == metric
        assert lines[-1]["step"] == 3 and np.isfinite(lines[-1]["distillation_loss"])
    assert "projector" not in capsys.readouterr().out


@pytest.mark.slow
def test_metrics_of_maps_from_the_shell(shell, capsys):
    _, lines = shell("--metric=wkd-f", *RESNETS)
    assert "the student's last map to the teacher's 64 channels" in capsys.readouterr().out
    assert lines[-1]["step"] == 3 and lines[-1]["distillation_loss"] > 0
    _, lines = shell("--metric=kd+nst:stages=1,2", "--coef=0.9,25", *RESNETS)
    kd, nst = (lines[-1][f"distillation_loss/{name}"] for name in ("kd", "nst:stages=1,2"))
    assert lines[-1]["distillation_loss"] == pytest.approx(0.9 * kd + 25 * nst, rel=1e-5)
