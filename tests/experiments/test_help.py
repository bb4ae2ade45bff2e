"""What the shell shows before anything runs: the list of mains, and each one's --help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import NAMES

ROOT = Path(__file__).parents[2]


def shown(module, *flags, width=80):
    """Return the lines that a command prints into a terminal of this width."""
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(width), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip().splitlines()


def flags(lines):
    return [line.split()[1].removeprefix("--") for line in lines if line.startswith("│ --")]


def test_the_list_has_every_main_on_one_line():
    lines = shown("experiments")
    assert [line.split()[0] for line in lines[2:]] == list(NAMES)
    assert all(len(line) <= 80 for line in lines) and all(len(line) > 40 for line in lines[2:])
    files = (ROOT / "experiments").glob("[a-z]*.py")
    assert sorted(NAMES) == sorted(["bench", *(file.stem for file in files)])


# A training main has more flags than a screen has lines at 80 characters.
TRAINS = ("digits", "mnist", "cifar", "svhn", "images")


@pytest.mark.parametrize(
    ("width", "height"), [(80, 50), pytest.param(100, 40, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", NAMES)
def test_help_fits_a_screen(name, width, height):
    lines = shown(f"experiments.{name}", "--help", width=width)
    height += (14 if width == 80 else 21) * (name in TRAINS) + 10 * (name == "images")
    assert len(lines) <= height, "\n".join(lines)
    assert all(len(line) <= width for line in lines[1:])  # the usage is one line for the shell
    assert f"    python -m experiments.{name}" in "\n".join(lines)
    told = " ".join(" ".join(line.strip("│ ").split()) for line in lines)
    positional = told.count("positional arguments")
    said = told.count("(default: ") + told.count("(required)")
    assert said == len(flags(lines)) + positional > 0
    if "coef" in flags(lines) and "metric" in flags(lines):
        assert "jw2:beta=0.5" in told and "nats per unit of the metric" in told


@pytest.mark.slow
def test_the_command_speaks_of_itself_in_a_clone_too():
    assert shown("kd2m_jax")[0].startswith("kd2m NAME ")
    assert "    kd2m digits --metric=jw2" in shown("kd2m_jax", "digits", "--help")


@pytest.mark.parametrize("command", ["kd2m_jax", "experiments", "experiments.digits"])
@pytest.mark.slow
def test_help_into_a_closed_pipe_is_quiet(command):
    """As into ``| head -1``, which has read enough before all is written."""
    process = subprocess.Popen(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_flags_come_in_the_order_of_deciding():
    found = flags(shown("experiments.cifar", "--help"))
    chosen = ["dataset", "metric", "coef", "teacher", "protocol", "out", "distributed"]
    assert sorted(chosen, key=found.index) == chosen
