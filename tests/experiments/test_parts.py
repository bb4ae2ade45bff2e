"""The parts of a training main that can be looked at without training anything."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm import tqdm

from experiments import digits
from experiments.common import cli
from experiments.runs import progress, report, settings
from experiments.runs.folder import RunFolder
from experiments.runs.protocols import PROTOCOLS


def test_the_users_home_after_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    read = lambda one: found.append(one)  # noqa: E731
    found: list[settings.Settings] = []
    flags = ["--out=~/x", "--pretrained-teacher=~/w.pth", "--data-dir=~", "--metric=w2@logits"]
    monkeypatch.setattr(sys, "argv", ["main", *flags])
    cli.main(digits.DEFAULTS, read, module="experiments.digits", description="")
    run, networks = found[0].run, found[0].networks
    assert (run.out, run.data_dir) == (f"{tmp_path}/x", str(tmp_path))
    assert networks.pretrained_teacher == f"{tmp_path}/w.pth"
    assert found[0].distillation.metric == "w2@logits"


class Counted(list):
    """A list that knows how often it was gone through."""

    passes = 0

    def __iter__(self):
        Counted.passes += 1
        return super().__iter__()


def test_the_curves_do_not_go_through_the_log_once_a_record(tmp_path):
    passes = []
    for epochs in (2, 20):
        records = [
            {"phase": phase, "step": 3 * epoch, "epoch": epoch, "task_loss": 1.0,
             "test_accuracy": 0.5, "distillation_loss": 1.0}
            for phase in report.TITLES for epoch in range(1, epochs + 1)
        ]  # fmt: skip
        Counted.passes = 0
        report._curves(Counted(records), "w2", tmp_path / "curves.png")
        passes.append(Counted.passes)
    assert passes[0] == passes[1]


def test_an_epoch_on_the_curves_is_a_pass_over_the_data():
    records = [{"step": k, "epoch": 1 + k // 5} for k in (2, 4, 6)]
    assert [e for e, _ in report._with_epochs(records)] == [1, 1, 2]  # no evaluation: as counted
    records[1]["test_accuracy"] = 0.5
    assert [e for e, _ in report._with_epochs(records)] == [0.5, 1, 1.5]


def test_a_bar_counts_what_was_replayed_as_done_but_not_as_speed(monkeypatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    with tqdm(total=100, disable=False, file=io.StringIO()) as bar:
        shown = progress.Progress(bar, batch_size=4)
        shown({"step": 5, "loss": 1.0, "replayed": True})
        assert (bar.n, bar.initial, shown.images_per_second()) == (20, 20, None)
        shown({"step": 10, "loss": 1.0, "test_accuracy": 0.5})
        # One record of its own is a moment, not a stretch of time.
        assert (bar.n, bar.initial, shown.images_per_second()) == (40, 20, None)
        shown({"step": 20, "loss": 1.0})
        assert bar.n == 80 and shown.images_per_second() == 20.0
        assert "test=50.0%" in bar.postfix


def test_versions_that_are_no_longer_recorded_are_kept_as_earlier(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_environment(devices=["cpu"], backend="cpu")
    folder.write_environment(devices=["cpu"])
    assert json.loads((tmp_path / "env.json").read_text())["earlier"] == [{"backend": "cpu"}]


@pytest.mark.parametrize("epochs", [1, 3, 4, 8, 240])
def test_the_crd_schedule_loses_no_drop(epochs):
    """Of few epochs several drops fall together: each counts all the same."""
    optimizer = PROTOCOLS["crd"].optimizer(epochs, 10)
    state = optimizer.init({"w": jnp.ones(1)})
    state = optax.tree_utils.tree_set(state, count=jnp.asarray(10 * epochs + 1))
    updates, _ = optimizer.update({"w": jnp.ones(1)}, state, {"w": jnp.zeros(1)})
    np.testing.assert_allclose(updates["w"], -0.05 * 1e-3, rtol=1e-4)
