"""experiments.digits as two processes of two devices each: one result, and no one left waiting."""

import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from children import environment

from experiments.common.errors import UsageError
from experiments.runs.folder import read_metrics
from experiments.runs.settings import Run, Settings, check

ROOT = pathlib.Path(__file__).parents[2]
RUN = [sys.executable, "-m", "experiments.digits"]
FLAGS = ["--teacher=mlp-32-16", "--student=mlp-8-16"]
# It compares all rows by class, and compiles in half the time of cw2, which SCORES has below.
FLAGS += ["--metric=cmmd-rbf", "--coef=1e-2", "--epochs=4"]
# The same, but a process counts as dead after 10 s of silence instead of 30.
IMPATIENT = """
import runpy
from experiments.common.cli import prepare_jax
prepare_jax()
from kd2m_jax.training import _processes
_processes._DEAD_AFTER_S = 10
runpy.run_module("experiments.digits", run_name="__main__")
"""


def start(out, devices, *flags, run=RUN):
    return subprocess.Popen(
        [*run, *FLAGS, f"--out={out}", *flags],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(out, *flags, each=((), ()), run=RUN):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"--coordinator=localhost:{free.getsockname()[1]}"
    together = ("--distributed", where, "--num-processes=2")
    given = [(*together, f"--process-id={i}", *flags, *each[i]) for i in range(2)]
    return [start(out, 2, *one, run=run) for one in given]


def finish(processes, timeout=240):
    """Status, output and errors of each, which must all end in that many seconds."""
    end = time.monotonic() + timeout
    try:
        texts = [p.communicate(timeout=end - time.monotonic()) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def assert_same(out, expected):
    found = read_metrics(out)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.pop("phase") == other["phase"]
        numbers = {name: value for name, value in other.items() if name != "phase"}
        assert one == pytest.approx(numbers, rel=1e-4)
        assert one.get("test_accuracy") == other.get("test_accuracy")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return what one process of four devices writes, and where its teacher is."""
    out = tmp_path_factory.mktemp("alone") / "run"
    [(status, _, errors)] = finish([start(out, 4)])
    assert status == 0, errors
    return read_metrics(out), out.parent / "teachers"


@pytest.mark.slow
def test_two_processes_end_with_the_result_of_one(alone, tmp_path):
    first, second = finish(start_two(tmp_path / "run"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert_same(tmp_path / "run", alone[0])
    assert "distilled student" in first[1]
    assert "distilled student" not in second[1]
    assert len(json.loads((tmp_path / "run" / "env.json").read_text())["devices"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "sent", "statuses", "message"),
    [
        # Without process 0, which they all report to, JAX itself ends the others; without process 1
        # it does so where no collective notices within the time of a heartbeat.
        (1, signal.SIGKILL, (None, -signal.SIGKILL), "another task died"),
        (0, signal.SIGKILL, (-signal.SIGKILL, None), "another task died"),
        (1, signal.SIGTERM, (143, 143), "error: stopped and saved"),
    ],
    ids=["second-killed", "first-killed", "second-terminated"],
)
def test_one_that_ends_stops_the_other_and_resume_goes_on(
    which, sent, statuses, message, alone, tmp_path
):
    out, (expected_records, teachers) = tmp_path / "run", alone
    shutil.copytree(teachers, tmp_path / "teachers")  # it is the student's training that ends
    run = [sys.executable, "-c", IMPATIENT] if sent == signal.SIGKILL else RUN
    processes = start_two(out, run=run)
    while not any(r["phase"] == "student" for r in read_metrics(out)):
        assert all(p.poll() is None for p in processes)
        time.sleep(0.02)
    processes[which].send_signal(sent)
    ended = finish(processes, timeout=60)
    for (status, *_), expected in zip(ended, statuses, strict=True):
        assert status in (1, -signal.SIGABRT) if expected is None else status == expected, ended
    # Whichever notices first: the collective under way, or the coordinator.
    assert re.search(f"{message}|broke off", ended[1 - which][2])
    assert "with --resume, continues" in ended[1][2]
    assert len(read_metrics(out)) < len(expected_records)
    first, second = finish(start_two(out, "--resume"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert_same(out, expected_records)


@pytest.mark.slow
def test_a_stop_before_the_first_step_is_not_lost(alone, tmp_path):
    out = tmp_path / "run"
    processes = start_two(out)
    while not (out / "env.json").exists():  # from here to the first step all is compiled
        assert all(p.poll() is None for p in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes, timeout=60)
    assert [status for status, *_ in ended] == [143, 143], ended
    assert all("error: stopped and saved" in errors for *_, errors in ended)
    assert not read_metrics(out)
    first, second = finish(start_two(out, "--resume"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert_same(out, alone[0])


@pytest.mark.slow
def test_other_settings_are_refused_by_all(tmp_path):
    processes = start_two(tmp_path / "run", each=(["--coef=1e-2"], ["--coef=1e-3"]))
    for status, _, errors in finish(processes):
        assert status == 2, errors
        assert "error: processes 0 and 1" in errors and "coef [0.01] in 0, [0.001] in 1" in errors


# Of 101 images, which neither two processes nor four devices divide.
SCORES = """
import json, sys
from kd2m_jax import fit, internal, models
coordinator, count, number, out = sys.argv[1:]
if count == "2":
    internal.start(coordinator, 2, int(number))
import jax, numpy as np
from flax import nnx
rng = np.random.default_rng(0)
x = rng.normal(size=(229, 6)).astype(np.float32)
y = (x @ rng.normal(size=(6, 7))).argmax(1).astype(np.int32)
rows = lambda out, labels: len(labels)
rows.__name__ = "rows"
own = lambda out, labels: (np.asarray(out.features).mean(1) * labels).sum()
own.__name__ = "own"
teacher, student = (models.MLP((w, 4), 7, in_features=6, rngs=nnx.Rngs(w)) for w in (16, 8))
found = fit(student, (x[:128], y[:128]), teacher=teacher, metric="cw2", batch_size=32, epochs=2,
            eval_data=(x[128:], y[128:]), metrics=["top-5", "ece", "agreement", rows, own])
tested = [r for r in found.history if "test_loss" in r]
scores = [{k: v for k, v in r.items() if k.startswith("test_")} for r in tested]
open(f"{out}{number}", "w").write(json.dumps([[jax.process_count(), jax.device_count()], *scores]))
"""


@pytest.mark.slow
def test_scores_of_two_processes_are_those_of_one(tmp_path):
    def begin(name, count, number, devices, where):
        given = [where, str(count), str(number), str(tmp_path / name)]
        return subprocess.Popen(
            [sys.executable, "-c", SCORES, *given],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    ended = finish([begin("alone", 1, 0, 4, "")])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    ended += finish([begin("both", 2, i, 2, where) for i in range(2)])
    assert [status for status, *_ in ended] == [0, 0, 0], ended
    (alone_where, *alone), *both = (
        json.loads((tmp_path / n).read_text()) for n in ("alone0", "both0", "both1")
    )
    assert alone_where == [1, 4] and len(alone) == 2
    assert [where for where, *_ in both] == [[2, 4], [2, 4]]
    for epoch, expected in enumerate(alone, 1):
        names = {"accuracy", "loss", "top_5", "ece", "agreement", "rows", "own"}
        assert expected.keys() == {f"test_{name}" for name in names}
        assert expected["test_rows"] == 101
        for found in both:
            assert found[epoch] == pytest.approx(expected, rel=1e-4)


WHOLE = {"distributed": True, "coordinator": "localhost:1", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "localhost:1"}, "come together, with --distributed"),
        ({"distributed": True, "process_id": 0}, "come together, with --distributed"),
        (WHOLE | {"process_id": 2}, "--process-id must be from 0 to 1, got 2"),
        (WHOLE | {"coordinator": "localhost"}, "--coordinator must be HOST:PORT, got localhost"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message):
    with pytest.raises(UsageError, match=message):
        check(Settings(run=Run(**flags)))
