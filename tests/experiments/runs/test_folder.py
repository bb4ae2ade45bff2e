"""The run folder: its lock, its environment, and what it refuses."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from children import environment
from matplotlib import get_cachedir

from experiments import digits
from experiments.common import cli
from experiments.runs.folder import RunFolder
from kd2m_jax.internal import locked

ROOT = Path(__file__).parents[3]
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


def test_another_solver_is_said(tmp_path, capsys):
    """Begun on a GPU, say, and continued on a CPU."""
    folder = RunFolder(tmp_path)
    folder.write_environment(devices=["gpu"], solver={"w2": "sinkhorn"})
    folder.write_environment(devices=["gpu"], solver={"w2": "sinkhorn"})
    assert capsys.readouterr().out == ""
    folder.write_environment(devices=["cpu"], solver={"w2": "exact"})
    assert (
        "begun with solver sinkhorn for w2, and goes on here with exact" in capsys.readouterr().out
    )


def finished(folder):
    """Leave a small finished run there; returns its flags."""
    flags = [f"--out={folder}", "--max-steps=2", "--metric=l2", *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, *flags)
    return flags


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, finished(folder)


def cut(content):
    return content[: len(content) // 2]


DAMAGE = {
    "empty": lambda content: b"",
    "cut": cut,
    "a list": lambda content: b"[1, 2]\n",
    "null": lambda content: b"null\n",
    "not UTF-8": lambda content: b"\xff\xfe" + content,
}


seldom = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("empty", "null")]


@pytest.mark.parametrize("kind", ["cut", "a list", "not UTF-8", *seldom])
def test_a_resumed_run_uses_what_is_good_and_says_what_is_not(
    kind, whole, monkeypatch, capsys, tmp_path
):
    shutil.copytree(whole[0].parent, tmp_path / "all")
    run = tmp_path / "all" / "run"
    expected = (run / "metrics.jsonl").read_bytes()
    for name in ("config.json", "env.json", "metrics.jsonl"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(DAMAGE[kind](content))
    in_process(monkeypatch, f"--out={run}", *whole[1][1:], "--resume")
    told = capsys.readouterr().err
    assert f"{run / 'config.json'} cannot be read" in told
    assert f"{run / 'env.json'} cannot be read" in told
    assert ("metrics.jsonl: what is in line 1" in told) == (kind not in ("empty", "cut"))
    assert (run / "metrics.jsonl").read_bytes() == expected
    assert json.loads((run / "config.json").read_text())["metric"] == "l2"
    assert json.loads((run / "env.json").read_text())["packages"]
    assert len(list(run.glob("config.json.unreadable-*"))) == 1


def test_a_run_of_other_settings_is_refused_even_then(whole, monkeypatch, capsys, tmp_path):
    """The checkpoints know what they are of."""
    shutil.copytree(whole[0].parent, tmp_path / "all")
    run = tmp_path / "all" / "run"
    (run / "config.json").write_text("null")
    flags = [flag.replace("l2", "w2") for flag in whole[1][1:]]
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, f"--out={run}", *flags, "--resume")
    assert stop.value.code == 2
    assert "metric ['l2'] -> ['w2']" in capsys.readouterr().err


def test_a_folder_that_is_deleted_meanwhile_is_one_line(monkeypatch, capsys, tmp_path):
    from experiments.runs import train

    fit = train.fit

    def deleting(network, data, **options):
        options["callbacks"] = [lambda record: shutil.rmtree(tmp_path / "run"),
                                *options["callbacks"]]  # fmt: skip
        return fit(network, data, **options)

    monkeypatch.setattr(train, "fit", deleting)
    with pytest.raises(SystemExit) as stop:
        finished(tmp_path / "run")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and error.startswith("error: No such file or directory: ")
    assert "--resume continues" in error


def test_a_name_that_is_too_long_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit):
        finished(tmp_path / (300 * "a"))
    assert "error: File name too long: " in capsys.readouterr().err


def test_without_a_home_no_programs_are_kept(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    cli.prepare_jax()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc")
def test_runs_in_one_process_leave_no_files_and_no_threads(tmp_path):
    def open_ones():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    finished(tmp_path / "a" / "run")
    before = open_ones()
    for name in ("b", "c", "d"):
        finished(tmp_path / name / "run")
    assert open_ones() == before


@contextlib.contextmanager
def no_file_larger_than(size):
    """As if the disk were full: no file may become larger than so many bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")


@pytest.mark.slow
@linux
@pytest.mark.parametrize("size", [300, 3_000, 20_000])
def test_a_full_disk_is_one_line_and_resume_goes_on(size, whole, monkeypatch, capsys, tmp_path):
    flags = [f"--out={tmp_path / 'run'}", *whole[1][1:]]
    with no_file_larger_than(size), pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *flags)
    failed = capsys.readouterr().err
    assert stop.value.code in (1, 2) and "Traceback" not in failed
    assert failed.strip().splitlines()[-1].startswith("error: ")
    in_process(monkeypatch, *flags, "--resume")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.count("\n") == (whole[0] / "metrics.jsonl").read_text().count("\n")


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv[0] = "experiments.digits"
runpy.run_module("experiments.digits", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@linux
def test_a_full_disk_ends_a_process_quietly(whole, tmp_path):
    """Its threads and what is left open have nothing to say either."""
    command = [sys.executable, "-c", LIMITED, "3000", f"--out={tmp_path / 'run'}", *whole[1][1:]]
    env = environment() | {"MPLCONFIGDIR": get_cachedir(), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    failed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert failed.returncode in (1, 2) and "Traceback" not in failed.stderr
    assert failed.stderr.strip().splitlines()[-1].startswith("error: ")
    command[2:4] = [LIMITED, str(2**40), "--resume"]
    del env["JAX_ENABLE_COMPILATION_CACHE"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it_quietly(whole, tmp_path):
    shutil.copytree(whole[0].parent, tmp_path / "all")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "experiments.digits", f"--out={tmp_path / 'all' / 'run'}"]
    done = subprocess.run([*command, *whole[1][1:], "--resume"], cwd=ROOT, env=environment(),
                          stdout=write, stderr=subprocess.PIPE, text=True)  # fmt: skip
    os.close(write)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert (tmp_path / "all" / "run" / "report.md").exists()
