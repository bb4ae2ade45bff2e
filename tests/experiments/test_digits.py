"""experiments.digits as its users run it: a process of its own, a folder, and mistakes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest
from children import environment
from matplotlib import get_cachedir
from torch_files import pickled_state, torch_state, write_pth, write_safetensors

from experiments import digits
from experiments.common import cli
from experiments.runs import report
from experiments.runs.folder import RunFolder, read_metrics

ROOT = Path(__file__).parents[2]
SMALL = ["--teacher=mlp-32-16", "--student=mlp-8-16", "--epochs=6", "--batch-size=256"]


def command(out, *flags):
    return [sys.executable, "-m", "experiments.digits", f"--out={out}", *flags]


def digits_run(out, *flags, env=None):
    return subprocess.run(
        command(out, *flags), cwd=ROOT, env=env or environment(), capture_output=True, text=True
    )


def in_process(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["experiments.digits", *flags])
    cli.main(digits.DEFAULTS, digits.run, module="experiments.digits", description="")


def check_folder(run, networks):
    """Check everything that a run of 12 steps with jw2 leaves; returns its records."""
    config = json.loads((run / "config.json").read_text())
    assert (config["metric"], config["seed"], config["max_steps"]) == ("jw2", 0, 12)
    assert (config["teacher"], config["student"]) == networks
    env = json.loads((run / "env.json").read_text())
    assert {"jax", "flax", "ott-jax"} <= env["packages"].keys()
    lines = read_metrics(run)
    assert {line["phase"] for line in lines} == {"teacher", "student", "distilled"}
    for phase in ("teacher", "student", "distilled"):
        last = [line for line in lines if line["phase"] == phase][-1]
        assert last["step"] == 12
        assert 0 < last["test_accuracy"] <= 1
        assert (last["test_accuracy"] * 450) % 1 == pytest.approx(0, abs=1e-6)  # of all examples
        assert {"epoch", "loss", "task_loss"} <= last.keys()
        assert ("distillation_loss" in last) == (phase == "distilled")
    text = (run / "report.md").read_text()
    assert "curves.png" in text and "jw2" in text and env["packages"]["jax"] in text
    assert (run / "curves.png").stat().st_size > 10_000
    assert len(list((run / "tensorboard").glob("*/events*"))) == 3
    (teacher,) = (run.parent / "teachers").iterdir()
    made_by = json.loads((teacher / "made_by.json").read_text())
    assert made_by.items() <= config.items() and made_by["teacher"] == networks[0]
    return lines


@pytest.mark.slow
def test_a_run_leaves_its_folder_and_another_puts_it_aside(monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    flags = [f"--out={run}", *SMALL, "--max-steps=12"]
    in_process(monkeypatch, *flags, "--metric=jw2")
    told = capsys.readouterr()
    for word in ("teacher", "student alone", "distilled student", "mlp-32-16", "mlp-8-16", "%"):
        assert word in told.out
    assert "images/s" in told.err  # the progress bar
    lines = check_folder(run, ("mlp-32-16", "mlp-8-16"))
    assert (run / "notes.txt").read_text() == "mine"

    # Once more: the teacher is taken from the cache, the old files are kept aside.
    in_process(monkeypatch, *flags, "--metric=none")
    assert read_metrics(run / "previous-1") == lines
    assert len(list((tmp_path / "teachers").iterdir())) == 1
    untouched = [line for line in lines if line["phase"] != "distilled"]
    assert read_metrics(run) == untouched

    # And resumed with settings that are not its own.
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *flags, "--metric=w2", "--resume")
    assert stop.value.code == 2
    assert "other settings (metric none -> w2)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_readme_command_leaves_its_folder(tmp_path):
    """As a process of its own, twice: the second one from the programs and the teacher of both."""
    # The programs in a user's own cache, matplotlib's fonts where they are.
    env = environment(level=1)
    env |= {"XDG_CACHE_HOME": str(tmp_path), "MPLCONFIGDIR": get_cachedir()}
    del env["JAX_COMPILATION_CACHE_DIR"]
    done = digits_run(tmp_path / "run", "--metric=jw2", "--max-steps=12", env=env)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "kd2m_jax").iterdir())
    for word in ("teacher", "student alone", "distilled student", "resnet8", "mlp-32-64", "%"):
        assert word in done.stdout
    assert "images/s" in done.stderr  # the progress bar
    lines = check_folder(tmp_path / "run", ("resnet8", "mlp-32-64"))
    again = digits_run(tmp_path / "run", "--metric=none", "--max-steps=12", env=env)
    assert again.returncode == 0, again.stderr
    assert read_metrics(tmp_path / "run") == [x for x in lines if x["phase"] != "distilled"]


def start(out, *flags):
    """Start the command; return it and its files."""
    return subprocess.Popen(
        command(out, *flags),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_when(process, reached, how, after=0.0):
    """Send a signal so many seconds after something is true; the exit status and the messages."""
    end = time.monotonic() + 120
    while process.poll() is None and not reached():
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(how)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


def lines_of(run):
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def arrays_of(folder):
    """Return the arrays of the newest checkpoints of a folder."""
    newest = {kind: max(map(int, os.listdir(folder / kind))) for kind in ("last", "best")}
    with ocp.StandardCheckpointer() as checkpointer:
        return newest, {
            kind: checkpointer.restore((folder / kind / str(step) / "tree").absolute())
            for kind, step in newest.items()
        }


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(tmp_path):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"kill moments drawn with seed {seed}")
    flags = ["--metric=l2", *SMALL]  # seven processes compile it
    whole, out = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    done = digits_run(whole, *flags)
    assert done.returncode == 0, done.stderr
    total = lines_of(whole)

    def writing():
        """Somewhere a checkpoint is being written. Unlike glob, walk passes folders that vanish."""
        folders = (name for _, names, _ in os.walk(tmp_path / "cut") for name in names)
        return any(".orbax-checkpoint-tmp" in name for name in folders)

    # Three times a random while after a random number of lines, for a line alone is an epoch's
    # end, or near it; then in the middle of a write, then politely.
    moments = sorted(rng.sample(range(1, total), 3))
    for lines in moments:
        process, after = start(out, "--resume", *flags), rng.uniform(0, 1)
        status, _ = stop_when(process, lambda n=lines: lines_of(out) >= n, signal.SIGKILL, after)
        assert status in (0, -signal.SIGKILL)
    shutil.rmtree(out / "checkpoints" / "distilled", ignore_errors=True)  # so one is to come
    status, _ = stop_when(start(out, "--resume", *flags), writing, signal.SIGKILL)
    assert status == -signal.SIGKILL and writing()  # it is left there, half written
    # Lines of this process alone: before its first step a signal ends it like any other.
    file = out / "metrics.jsonl"
    kept = [line for line in file.read_text().splitlines(True) if "distilled" not in line]
    file.write_text("".join(kept))
    process = start(out, "--resume", *flags)
    distilling = lambda: "distilled" in file.read_text()  # noqa: E731
    status, errors = stop_when(process, distilling, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, errors
    assert "stopped and saved; the same command with --resume continues" in errors
    resumed = digits_run(out, "--resume", *flags)
    assert resumed.returncode == 0, resumed.stderr

    assert report.text_table(RunFolder(out)) == report.text_table(RunFolder(whole))
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    folders = [path / "checkpoints" / name for name in ("student", "distilled")
               for path in (out, whole)]  # fmt: skip
    folders += [next((path.parent / "teachers").iterdir()) for path in (out, whole)]
    for found, expected in zip(folders[::2], folders[1::2], strict=True):
        chex.assert_trees_all_equal(arrays_of(found), arrays_of(expected))


def save_with_torch(path, state):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, path)


@pytest.mark.slow
@pytest.mark.parametrize("save", [lambda path, s: write_pth(path, *pickled_state(s)),
                                  save_with_torch])  # fmt: skip
def test_pretrained_weights_are_where_both_networks_begin(save, monkeypatch, tmp_path):
    one = torch_state("resnet8", num_classes=10, in_channels=1)
    states = {"one": one, "two": one | {"layer3.0.bn2.bias": 1 + one["layer3.0.bn2.bias"]}}
    for name, state in states.items():
        write_safetensors(tmp_path / f"{name}.safetensors", state)
        save(tmp_path / f"{name}.pth", state)
    losses = {}
    for teacher, student in (("one", "two"), ("two", "one")):
        files = [f"--pretrained-teacher={tmp_path / teacher}.safetensors",
                 f"--pretrained-student={tmp_path / student}.pth"]  # fmt: skip
        flags = ["--teacher=resnet8", "--student=resnet8", "--metric=none", "--max-steps=1"]
        in_process(monkeypatch, f"--out={tmp_path / teacher}", *flags, *files)
        for line in read_metrics(tmp_path / teacher):
            losses[line["phase"], teacher if line["phase"] == "teacher" else student] = line["loss"]
    # Step 1 is a matter of the weights alone: the batch is the same in all phases.
    assert losses["teacher", "one"] == losses["student", "one"]
    assert losses["teacher", "two"] == losses["student", "two"]
    assert abs(losses["teacher", "one"] - losses["teacher", "two"]) > 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric=gausian-w2"], "unknown metric 'gausian-w2': did you mean gaussian-w2"),
        (["--metric=w2@labels"], "on 'features' or on 'logits', not on 'labels'"),
        (["--teacher=resnt8"], "--teacher: unknown network 'resnt8'; nearest: resnet8"),
        (["--student=mlp-0"], "--student: widths must be positive"),
        (["--metric=kd+w3", "--coef=1,1"], "unknown metric 'w3': did you mean"),
        (["--metric=kd+cw2", "--coef=1"], "--coef needs 2 numbers for --metric=kd+cw2, got 1"),
        (["--metric=wkd-f"], "wkd-f compares convolutional maps"),
        (["--coef=much"], "--coef must be numbers >= 0, got 'much'"),
        (["--per-class=3"], "--per-class 3 does not divide --batch-size 128"),
        (["--protocol=kdm"], "--protocol cannot be 'kdm': did you mean kd2m?"),
        (["--coef=-1"], "--coef must be a number >= 0, got -1.0"),
        (["--coef=nan"], "--coef must be a number >= 0, got nan"),
        (["--task-coef=inf"], "--task-coef must be a number >= 0, got inf"),
        (["--epochs=0"], "--epochs must be at least 1, got 0"),
        (["--batch-size=0"], "--batch-size must be at least 1, got 0"),
        (["--batch-size=2000"], "--batch-size 2000 is larger than the training set (1347 images)"),
        (["--batch-size=127"], "--batch-size 127 does not split evenly over 4 devices"),
        (["--metric=nst"], "--metric=nst: "),
        (
            ["--per-class=256", "--batch-size=256"],
            "--per-class: per_class 256 would never draw these classes",
        ),
        (["--seed=-1"], "--seed must be at least 0"),
        (["--seed=18446744073709551616"], "--seed must be at least 0 and below 2^32"),
        (["--metric=jw2:beta=1:beta=2"], "metric 'jw2' is given beta twice"),
        (["--metric=jw2:beta=" + 400 * "9"], "beta must be a number that float32 holds"),
        (["--metric=mmd-rbf:bandwidth=1e200"], "bandwidth must be"),
        (["--metric=jw2:beta=" + 5000 * "-" + "1"], "beta must be >= 0, got -----"),
        (["--data-dir=gs://bucket/data"], "--data-dir gs://bucket/data is no local folder"),
        (["--max-steps=0"], "--max-steps must be at least 1"),
        (["--pretrained-student=no.pth"], "--pretrained-student"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, monkeypatch, capsys, tmp_path):
    limit = [] if "--max-steps=0" in flags else ["--max-steps=1"]
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, f"--out={tmp_path / 'run'}", *limit, *flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    error = captured.err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert "Traceback" not in captured.err
    # Nothing was left behind and nothing was trained before the mistake was seen.
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--metirc=w2"], "--metirc"), (["--epochs=many"], "many"), (["--coef"], "--coef")],
)
def test_a_flag_that_cannot_be_read_is_status_2(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert message in captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err


def test_a_diverging_run_names_the_step(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        in_process(
            monkeypatch,
            f"--out={tmp_path / 'run'}",
            "--metric=l2",
            "--coef=1e30",
            *SMALL,
        )
    assert stop.value.code == 1
    assert "the loss is not finite at step" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sum_of_metrics_with_a_projector(monkeypatch, capsys, tmp_path):
    networks = ["--teacher=mlp-32-16", "--student=mlp-8-12", "--max-steps=3", "--per-class=4"]
    sums = ["--metric=kd+cw2", "--coef=0.9,1e-3", "--task-coef=0.1"]
    in_process(monkeypatch, f"--out={tmp_path / 'run'}", *networks, *sums)
    assert "projector from the student's 12 features to the teacher's 16" in capsys.readouterr().out
    last = read_metrics(tmp_path / "run")[-1]
    kd, cw2 = (last[f"distillation_loss/{name}"] for name in ("kd", "cw2"))
    assert last["distillation_loss"] == pytest.approx(0.9 * kd + 1e-3 * cw2, rel=1e-5)
    total = 0.1 * last["task_loss"] + last["distillation_loss"]
    assert last["loss"] == pytest.approx(total, rel=1e-5)
