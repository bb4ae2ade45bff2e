"""Runs that are stopped, killed, doubled or damaged lose nothing and end with the same bits."""

import logging
import os
import signal
import threading

import chex
import jax
import numpy as np
import optax
import pytest
from clouds import draw
from flax import nnx

from kd2m_jax import CheckpointError, Stopped, fit, models
from kd2m_jax._locks import locked

N, D = 96, 10


class Killed(Exception):
    """What a kill is to the loop: the end, wherever it stands."""


def data(seed=0):
    x, _, labels = draw("clustered", N, D, classes=3, seed=seed)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed, width=8):
    return models.MLP((width, 6), 3, in_features=D, rngs=nnx.Rngs(seed))


def run(**options):
    """Four epochs of six steps."""
    defaults = {"epochs": 4, "batch_size": 16, "eval_data": data(1), "seed": 5, "log_every": 1}
    return fit(mlp(1), data(), teacher=mlp(0, 32), metric="cw2", coef=0.01, **defaults | options)


@pytest.fixture(scope="module")
def whole():
    return run()


def assert_same(found, expected):
    assert found.history == expected.history
    for name in ("student", "best"):
        one, other = (nnx.to_pure_dict(nnx.state(getattr(r, name))) for r in (found, expected))
        chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, t) for t in (one, other)))


def at(step, act):
    def callback(record):
        if record["step"] == step and not record.get("replayed"):
            act()

    return callback


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# The record of step 5 is handed over before step 6, an epoch's last one, which is then finished.
@pytest.mark.parametrize("step", [1, 5, 14, 24])
def test_sigterm_finishes_the_step_and_saves(step, whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stop:
        run(checkpoint_dir=tmp_path, callbacks=[at(step, terminate)])
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    saved = max(int(path.name) for path in (tmp_path / "last").iterdir())
    assert saved == min(step + 1, 24)
    assert_same(run(checkpoint_dir=tmp_path), whole)


def test_a_run_cut_by_max_steps_goes_on_in_the_middle_of_its_epoch(whole, tmp_path):
    cut = run(checkpoint_dir=tmp_path, max_steps=9)
    assert cut.history[-1]["step"] == 9 and "test_accuracy" in cut.history[-1]
    # The default optimizer's schedule ends with max_steps, so the two runs get one of their own.
    sgd = {"optimizer": optax.sgd(0.1)}
    run(checkpoint_dir=tmp_path / "sgd", max_steps=9, **sgd)
    resumed, straight = run(checkpoint_dir=tmp_path / "sgd", **sgd), run(**sgd)
    chex.assert_trees_all_equal(resumed.state.params, straight.state.params)


def test_another_process_on_the_same_folder_is_refused(tmp_path):
    with (
        locked(tmp_path / ".lock"),
        pytest.raises(CheckpointError, match=f"is in use by another process .pid {os.getpid()}"),
    ):
        run(checkpoint_dir=tmp_path)
    assert not (tmp_path / "last").exists()


def test_a_lock_can_be_waited_for(tmp_path):
    said, order = threading.Event(), []

    def second():
        with locked(tmp_path / ".lock", waiting=lambda sentence: said.set()):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path / ".lock"):
        thread.start()
        assert said.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_damaged_checkpoint_is_passed_over_aloud(whole, tmp_path, caplog):
    with pytest.raises(Killed):
        run(checkpoint_dir=tmp_path, callbacks=[at(14, kill)])
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"6", "12"}
    for file in (tmp_path / "last" / "12").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, logger="kd2m_jax"):
        resumed = run(checkpoint_dir=tmp_path)
    assert "the checkpoint of step 12" in caplog.text and "the one before is used" in caplog.text
    assert_same(resumed, whole)


@pytest.mark.parametrize("folder", ["best", "last"])
def test_killed_between_and_inside_the_two_saves_of_an_epoch(folder, whole, tmp_path, monkeypatch):
    from orbax.checkpoint import CheckpointManager

    save = CheckpointManager.save

    def dying(self, step, **arguments):
        if self.directory.name == folder and step == 12:
            raise Killed
        return save(self, step, **arguments)

    improving = {"eval_data": data(), "optimizer": optax.sgd(0.02)}  # so that epoch 2 is a best one
    expected = run(**improving)
    monkeypatch.setattr(CheckpointManager, "save", dying)
    with pytest.raises(Killed):
        run(checkpoint_dir=tmp_path, **improving)
    monkeypatch.undo()
    assert_same(run(checkpoint_dir=tmp_path, **improving), expected)


def test_a_checkpoint_moves_to_another_number_of_devices(whole, tmp_path):
    with pytest.raises(Killed):
        run(checkpoint_dir=tmp_path, devices=jax.devices()[:1], callbacks=[at(14, kill)])
    resumed = run(checkpoint_dir=tmp_path, devices=jax.devices())
    for found, expected in zip(resumed.history, whole.history, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
