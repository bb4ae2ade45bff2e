"""README and the first pages do what they say: their code runs, and so do their commands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import environment

from experiments.runs.folder import read_metrics

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
# Pages whose code runs from top to bottom, and whose commands are run.
PAGES = {"README": TEXT}
PAGES |= {name: (ROOT / f"docs/{name}.md").read_text() for name in ("install", "quickstart")}
PAGES |= {"shell": (ROOT / "docs/shell.md").read_text()}


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README", "quickstart"])
def test_the_python_blocks_run_one_after_the_other(page):
    namespace = {}
    for code in blocks("python", PAGES[page]):
        exec(compile(code, page, "exec"), namespace)
    assert np.isfinite(namespace["result"].history[-1]["loss"])
    if page == "quickstart":
        assert namespace["variables"].keys() == {"params", "batch_stats"}
    else:
        assert namespace["result"].history[-1]["test_accuracy"] > 0.8


def test_it_is_one_screen():
    assert len(TEXT.splitlines()) <= 120 and len(TEXT.split()) <= 900


def test_the_two_commands_stand_on_lines_of_their_own():
    lines = TEXT.splitlines()
    assert "pip install uv && uv run python -m experiments.digits --metric=jw2" in lines
    assert "pip install uv && uv run pytest" in lines


def test_the_one_result_is_the_measured_one():
    found = json.loads((ROOT / "docs/results/few_labels.json").read_text())
    (result,) = re.findall(r"<!-- The one result.*?-->\n(.*?)<!-- End", TEXT, re.DOTALL)
    for name in ("alone", "with a transfer set"):
        accuracies = 100 * np.array(found[name])
        assert f"{accuracies.mean():.1f}% ± {accuracies.std(ddof=1):.1f}" in result


def test_every_link_leads_to_a_file():
    targets = re.findall(r"\]\((?!http)([^)#]+)", TEXT)
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def experiment_commands():
    """Return what follows ``python`` in every experiment command of these pages."""
    lines = [
        x for text in PAGES.values() for block in blocks("bash", text) for x in block.split("\n")
    ]
    found = [line.partition("python -m experiments.")[2] for line in lines]
    return sorted({"experiments." + rest for rest in found if rest})


def test_every_training_main_is_shown():
    shown = {command.split()[0] for command in experiment_commands()}
    assert {"experiments.digits", "experiments.mnist", "experiments.cifar"} <= shown


# The whole of it is in tests/experiments/test_digits.py.
IN_FULL = "experiments.digits --metric=jw2"


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in experiment_commands() if c != IN_FULL])
def test_the_experiment_commands_run(command, real_data, tmp_path):
    module, *flags = shlex.split(command)
    if module != "experiments.digits" and not real_data.exists():
        pytest.skip("no real data sets on this machine")
    extra = [f"--out={tmp_path / 'run'}"]
    trains = module in ("experiments.digits", "experiments.mnist", "experiments.cifar")
    whole = "--max-steps" in command and trains
    if trains and module != "experiments.digits":
        extra += [f"--data-dir={real_data}"]
    if whole:
        extra += ["--batch-size=32"]
    if trains and not whole:
        extra += ["--max-steps=1", "--batch-size=8"]
        if "--teacher" not in command and module == "experiments.cifar":
            # ResNet-34 takes minutes on a CPU, and the command with its own networks has ResNets.
            extra += ["--teacher=mlp-32-16", "--student=mlp-8-16"]
    # Three evaluations of 10,000 images are most of a short run: 200 are as good here.
    code = f"""
import runpy, sys
from experiments.data import load
cached = load.cached
load.cached = lambda *given: [a[:m] for a, m in zip(cached(*given), (None, None, 200, 200))]
sys.argv[1:] = {[*flags, *extra]!r}
runpy.run_module({module!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(level=int(whole)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "teacher" in done.stdout
    for phase in ("teacher", "student", "distilled") if whole else ():
        lines = [line for line in read_metrics(tmp_path / "run") if line["phase"] == phase]
        losses = [line["task_loss"] for line in lines]
        assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.05, (phase, losses)
