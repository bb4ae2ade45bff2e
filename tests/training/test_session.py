"""Runs that are stopped, killed, doubled or damaged lose nothing and end with the same bits."""

import contextlib
import itertools
import logging
import os
import shutil
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
from kd2m_jax.internal import Records, locked
from kd2m_jax.training import _session as session_module
from kd2m_jax.training._checkpoints import Checkpoints

N, D = 96, 10


class Killed(BaseException):
    """What a kill is to the loop: the end, wherever it stands, without a last save."""


def data(seed=0):
    x, _, labels = draw("clustered", N, D, classes=3, seed=seed)
    return x.astype(np.float32), labels.astype(np.int32)


def mlp(seed, width=8):
    return models.MLP((width, 6), 3, in_features=D, rngs=nnx.Rngs(seed))


def run(**options):
    """Four epochs of six steps."""
    defaults = {"epochs": 4, "batch_size": 16, "eval_data": data(1), "seed": 5, "log_every": 1}
    defaults |= {"data": data(), "teacher": mlp(0, 32), "metric": "l2", "coef": 0.01}
    return fit(mlp(1), **defaults | options)


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


def names(folder):
    return {path.name for path in folder.iterdir()}


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


def test_terms_that_are_spelled_in_another_way_are_taken_up_between_records():
    def step(term, value):
        names = ("loss", "task_loss", "accuracy", "distillation_loss", "coef", term)
        return {name: np.array([value + k]) for k, name in enumerate(names)}

    begun, resumed = (Records([], has_teacher=True, total=2) for _ in range(2))
    begun.add(1, 1, step("distillation_loss/w2", 1.0))
    resumed.replay(begun.state())
    resumed.add(2, 1, step("distillation_loss/w2:solver=sinkhorn", 3.0))
    resumed.settle()
    resumed.close()
    assert list(resumed.history[0].values())[-3:] == [5.0, 6.0, 7.0]
    assert "distillation_loss/w2:solver=sinkhorn" in resumed.history[0]


def test_a_list_of_batches_is_taken_up_in_the_middle_of_an_epoch(tmp_path):
    x, labels = data()
    batches = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, N, 16)]
    whole = run(data=batches, epochs=2)
    with pytest.raises(Stopped):
        run(data=batches, epochs=2, checkpoint_dir=tmp_path, callbacks=[at(8, terminate)])
    assert max(map(int, names(tmp_path / "last"))) == 9
    assert_same(run(data=batches, epochs=2, checkpoint_dir=tmp_path), whole)


@pytest.mark.slow
def test_batch_statistics_and_augmentation_are_taken_up_too(tmp_path):
    """Within an epoch: the statistics so far, and the keys that the next steps draw from."""
    images = np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype(np.float32)
    labels = np.arange(32, dtype=np.int32) % 3

    def jitter(x, keys):
        if keys is None:
            return x
        return x + jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)

    def resnet(**options):
        student = models.resnet8(3, in_channels=1, rngs=nnx.Rngs(0))
        options |= {"eval_data": (images, labels), "optimizer": optax.sgd(0.1), "log_every": 1}
        options |= {"epochs": 2, "batch_size": 8, "devices": jax.devices()[:1]}
        return fit(student, (images, labels), preprocess=jitter, **options)

    whole = resnet()
    with pytest.raises(Stopped):
        resnet(checkpoint_dir=tmp_path, callbacks=[at(5, terminate)])
    assert max(map(int, names(tmp_path / "last"))) == 6  # of 8, 4 an epoch
    resumed = resnet(checkpoint_dir=tmp_path)
    assert_same(resumed, whole)
    chex.assert_trees_all_equal(
        *(jax.tree.map(np.asarray, r.state.model_state) for r in (resumed, whole))
    )


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


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(folder):
    for file in files_of(folder):
        os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(folder, item="tree"):
    """In the middle of the largest file of the arrays."""
    file = max(files_of(folder / item), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_a_bit_of_the_record(folder):
    """Damage the history, or where the run stood."""
    flip_a_bit(folder, "record")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, flip_a_bit_of_the_record])
def test_a_damaged_checkpoint_is_passed_over_aloud(damage, whole, tmp_path, caplog):
    with pytest.raises(Killed):
        run(checkpoint_dir=tmp_path, callbacks=[at(14, kill)], save_every=0)
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"13", "14"}
    damage(tmp_path / "last" / "14")
    with caplog.at_level(logging.WARNING, logger="kd2m_jax"):
        resumed = run(checkpoint_dir=tmp_path)
    assert "the checkpoint of step 14" in caplog.text and "the one before is used" in caplog.text
    assert_same(resumed, whole)
    # It is not ours to delete.
    (aside,) = (tmp_path / "last").glob("14.unreadable-*")
    assert files_of(aside) and {"13", "24", aside.name} == names(tmp_path / "last")


def test_without_a_checkpoint_that_can_be_read_a_run_begins_again_aloud(whole, tmp_path, caplog):
    with pytest.raises(Killed):
        run(checkpoint_dir=tmp_path, callbacks=[at(8, kill)], save_every=0)
    for folder in (tmp_path / "last").iterdir():
        (folder / "record" / "metadata").write_text("{}")
    with caplog.at_level(logging.WARNING, logger="kd2m_jax"):
        assert_same(run(checkpoint_dir=tmp_path), whole)
    assert "no earlier one: starting from the beginning" in caplog.text


def test_reading_leaves_a_damaged_folder_as_it_is(tmp_path, caplog):
    run(checkpoint_dir=tmp_path, epochs=1)
    truncate(tmp_path / "last" / "6")
    shutil.rmtree(tmp_path / "best")
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    with (
        contextlib.closing(Checkpoints(tmp_path, writing=False)) as reader,
        caplog.at_level(logging.WARNING, logger="kd2m_jax"),
    ):
        assert reader.restore({"x": np.zeros(2)}) is None
        assert reader.restore({"x": np.zeros(2)}, best=True) is None
    assert "no earlier one" in caplog.text and "from the beginning" not in caplog.text
    assert {path: path.read_bytes() for path in files_of(tmp_path)} == before
    assert names(tmp_path) == {".lock", "last"}


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_lost_best_checkpoint_gives_way_to_the_best_from_there_on(epochs, tmp_path, caplog):
    """Better not trained on than taken for the best: the evaluation data are the training data."""
    options = {"eval_data": data(), "optimizer": optax.sgd(0.02)}
    first = run(checkpoint_dir=tmp_path, epochs=2, **options)
    truncate(next(iter((tmp_path / "best").iterdir())))
    with caplog.at_level(logging.WARNING, logger="kd2m_jax"):
        resumed = run(checkpoint_dir=tmp_path, epochs=epochs, **options)
    assert "is lost: the best from step 12 on is kept instead" in caplog.text
    if epochs == 2:  # nothing left to do: the last one stands in
        found, expected = resumed.best, first.student
    else:
        tests = [r["test_accuracy"] for r in resumed.history if "test_accuracy" in r]
        x, labels = data()
        accuracy = (np.asarray(resumed.best(x).logits).argmax(1) == labels).mean()
        assert accuracy == pytest.approx(max(tests[2:]))
        return
    one, other = (nnx.to_pure_dict(nnx.state(model)) for model in (found, expected))
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, t) for t in (one, other)))


OTHER = [
    ({"seed": 6}, "seed 5 -> 6"),
    ({"batch_size": 24}, "batch_size 16 -> 24"),
    ({"per_class": 2}, "per_class None -> 2"),
    ({"metric": "w2"}, r"metric \['l2'\] -> \['w2'\]"),
    ({"coef": 0.1}, r"coef \[0.01\] -> \[0.1\]"),
]


def test_resuming_with_other_settings_says_which(tmp_path):
    run(checkpoint_dir=tmp_path, epochs=1)
    for options, message in OTHER:
        with pytest.raises(CheckpointError, match=f"made with other settings .{message}.: resume"):
            run(checkpoint_dir=tmp_path, **options)
    x, labels = data()
    with pytest.raises(CheckpointError, match="examples 96 -> 80"):
        run(checkpoint_dir=tmp_path, data=(x[:80], labels[:80]))
    assert run(checkpoint_dir=tmp_path, epochs=2).history[-1]["step"] == 12


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
        run(checkpoint_dir=tmp_path, save_every=0, **improving)
    monkeypatch.undo()
    assert_same(run(checkpoint_dir=tmp_path, **improving), expected)


def test_a_checkpoint_moves_to_another_number_of_devices(whole, tmp_path):
    with pytest.raises(Killed):
        run(
            checkpoint_dir=tmp_path,
            devices=jax.devices()[:1],
            callbacks=[at(14, kill)],
            save_every=0,
        )
    resumed = run(checkpoint_dir=tmp_path, devices=jax.devices())
    for found, expected in zip(resumed.history, whole.history, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_run_is_saved_by_time_within_an_epoch_too(tmp_path, monkeypatch):
    """Each call takes a second here, and an endless loader has no end of an epoch."""
    x, labels = data()
    clock = itertools.count()
    monkeypatch.setattr(session_module.time, "monotonic", lambda: next(clock))
    batches = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, N, 16)]

    class Endless:
        def __iter__(self):
            return itertools.cycle(batches)

    options = {"data": Endless(), "max_steps": 40, "optimizer": optax.sgd(0.02)}
    with pytest.raises(Killed):
        run(checkpoint_dir=tmp_path, save_every=20, callbacks=[at(30, kill)], **options)
    saved = sorted(map(int, names(tmp_path / "last")))
    assert saved and 10 < saved[-1] < 30
    monkeypatch.undo()
    assert_same(run(checkpoint_dir=tmp_path, **options), run(**options))


def test_save_every_0_saves_after_every_call_and_the_default_at_the_end_alone(tmp_path):
    run(checkpoint_dir=tmp_path / "each", save_every=0, epochs=1)
    assert names(tmp_path / "each" / "last") == {"5", "6"}
    run(checkpoint_dir=tmp_path / "end", epochs=2)
    assert names(tmp_path / "end" / "last") == {"12"}
    with pytest.raises(ValueError, match="save_every must be >= 0 seconds, got -1"):
        run(save_every=-1)


class Broken(Exception):
    pass


def breaking(batches, at):
    """Make an iterable of batches that raises in the first pass, before the given one."""
    passes = []

    class Data:
        def __len__(self):
            return len(batches)

        def __iter__(self):
            passes.append(None)
            for i, batch in enumerate(batches):
                if i == at and len(passes) == 3:  # the first pass looks at the first batch alone
                    raise Broken
                yield batch

    return Data()


def test_data_that_raises_loses_nothing(tmp_path):
    x, labels = data()
    batches = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, N, 16)]
    options = {"epochs": 2, "optimizer": optax.sgd(0.02)}
    with pytest.raises(Broken):
        run(data=breaking(batches, 3), checkpoint_dir=tmp_path, **options)
    assert names(tmp_path / "last") == {"9"}
    assert_same(run(data=batches, checkpoint_dir=tmp_path, **options), run(data=batches, **options))


@pytest.mark.parametrize("step", [2, 6, 24])
def test_a_callback_that_raises_loses_nothing(step, whole, tmp_path):
    """Within an epoch, with its evaluation, and at the very end."""

    def fail():
        raise Broken

    with pytest.raises(Broken):
        run(checkpoint_dir=tmp_path, callbacks=[at(step, fail)])
    # The call after the record's is under way by then, except at the end of an epoch.
    assert names(tmp_path / "last") == {str(step + (step % 6 > 0))}
    assert_same(run(checkpoint_dir=tmp_path), whole)


@pytest.mark.slow
def test_a_population_whose_callback_raises_loses_no_record(tmp_path):
    def population(**options):
        networks = [mlp(1), mlp(2)]
        options |= {"epochs": 2, "batch_size": 16, "eval_data": data(1), "log_every": 4, "seed": 5}
        return fit(networks, data(), teacher=mlp(0, 32), metric="l2", coef=0.01, **options)

    def fail(record):
        if record["step"] == 6 and record["student"] == 0 and not record.get("replayed"):
            raise Broken

    with pytest.raises(Broken):
        population(checkpoint_dir=tmp_path, callbacks=[fail])
    for found, expected in zip(population(checkpoint_dir=tmp_path), population(), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("step", [5, 14])
def test_ctrl_c_finishes_the_step_and_saves(step, whole, tmp_path):
    interrupt = at(step, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_dir=tmp_path, callbacks=[interrupt])
    assert names(tmp_path / "last") == {str(step + 1)}
    assert_same(run(checkpoint_dir=tmp_path), whole)


def test_writing_into_a_record_breaks_no_save(whole, tmp_path):
    def spoil(record):
        record.clear()
        record["step"] = object()

    found = run(checkpoint_dir=tmp_path, callbacks=[spoil], save_every=0)
    assert_same(found, whole)
    assert_same(run(checkpoint_dir=tmp_path), whole)


def test_the_best_checkpoint_is_the_one_of_the_save_that_is_taken_up(tmp_path, monkeypatch):
    """Killed after a newer best one was written: the run before must not get it."""
    from orbax.checkpoint import CheckpointManager

    save = CheckpointManager.save
    improving = {"eval_data": data(), "optimizer": optax.sgd(0.02)}

    def dying(self, step, **arguments):
        if self.directory.name == "last" and (tmp_path / "best" / "12").exists():
            raise Killed
        return save(self, step, **arguments)

    monkeypatch.setattr(CheckpointManager, "save", dying)
    with pytest.raises(Killed):
        run(checkpoint_dir=tmp_path, save_every=0, **improving)
    monkeypatch.undo()
    assert max(map(int, names(tmp_path / "best"))) == 12
    # Taken up before the evaluation of epoch 2, and not evaluated: the best is that of epoch 1.
    cut = run(checkpoint_dir=tmp_path, max_steps=11, epochs=2, **improving)
    x, labels = data()
    accuracy = (np.asarray(cut.best(x).logits).argmax(1) == labels).mean()
    tests = [r["test_accuracy"] for r in cut.history if "test_accuracy" in r]
    assert accuracy == pytest.approx(max(tests))
