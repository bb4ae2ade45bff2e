"""The command line: a user's home, and what is said after a stop."""

import sys
import types

import pytest

from experiments import bound, digits, mnist, table
from experiments.common import cli, errors
from experiments.runs import settings
from kd2m_jax import NonFiniteLoss


def test_the_users_home_after_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    read = lambda one: found.append(one)  # noqa: E731
    found: list[settings.Settings] = []
    flags = ["--out=~/x", "--pretrained-teacher=~/w.pth", "--data-dir=~", "--metric=w2@logits"]
    monkeypatch.setattr(sys, "argv", ["main", *flags])
    cli.main(mnist.DEFAULTS, read, module="experiments.mnist", description="")
    run, networks = found[0].run, found[0].networks
    assert (run.out, run.data_dir) == (f"{tmp_path}/x", str(tmp_path))
    assert networks.pretrained_teacher == f"{tmp_path}/w.pth"
    assert found[0].distillation.metric == "w2@logits"


def test_glibc_is_told_to_keep_memory_and_any_other_is_left_alone(monkeypatch):
    told = []
    library = types.SimpleNamespace(mallopt=lambda *given: told.append(given))
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: library)
    cli.keep_memory()
    assert told == [(-4, 0), (-1, 2**31 - 1), (-8, 1)]  # as in malloc.h
    del library.mallopt
    cli.keep_memory()

    def none(name):
        raise OSError("no C library")

    monkeypatch.setattr(cli.ctypes, "CDLL", none)
    cli.keep_memory()
    assert len(told) == 3


@pytest.mark.parametrize(("given", "found"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "8"}, "8")])
def test_decompositions_take_one_thread_unless_the_user_says_more(monkeypatch, given, found):
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    monkeypatch.setattr(cli.os, "environ", dict(given))
    cli.prepare_jax()
    assert cli.os.environ["OPENBLAS_NUM_THREADS"] == found


def test_a_loss_that_is_not_finite_says_what_to_try(monkeypatch, capsys):
    def run(settings):
        raise NonFiniteLoss("the loss is not finite at step 3")

    monkeypatch.setattr(sys, "argv", ["digits"])
    with pytest.raises(SystemExit) as stop:
        cli.main(digits.DEFAULTS, run, module="experiments.digits", description=None)
    assert stop.value.code == 1
    assert "at step 3; try a smaller --coef" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "settings", "end"),
    [
        ("digits", digits.DEFAULTS, "with --resume continues"),
        ("table", table.Table(), "the same command continues"),
        ("bound", bound.Bound(run="somewhere"), "the same command starts again"),
    ],
)
def test_a_main_that_is_stopped_says_how_to_go_on(name, settings, end, monkeypatch, capsys):
    def run(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as stop:
        cli.main(settings, run, module=f"experiments.{name}", description=None)
    assert stop.value.code == 130
    assert end in capsys.readouterr().err


def test_a_command_is_named_as_it_was_typed(monkeypatch):
    assert errors.command("experiments.digits --resume") == "python -m experiments.digits --resume"
    monkeypatch.setattr(errors, "BY_NAME", True)
    assert errors.command("experiments.digits --resume") == "kd2m digits --resume"
