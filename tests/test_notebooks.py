"""The notebooks: each .ipynb in step with its script, small, and running from top to bottom.

After a change to a script, ``python tests/test_notebooks.py [NAME ...]`` brings its notebook in
step, executes it and writes the outputs; ``--address`` puts the repository's address, which
pyproject.toml has, into all of them and executes nothing.
"""

import ast
import base64
import copy
import io
import json
import os
import re
import resource
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbclient
import nbformat
import pytest
from children import environment
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
TITLES = {
    "metrics_playground": "Metrics playground: what each distance sees",
    "bring_your_own": "Bring your own model, loop and teacher",
    "distill_digits": "Distilling digits, from data to what the student gained",
    "reproduce_the_paper": "From run folders to the paper's table, figure and bound",
}
NAMES = tuple(TITLES)
# What their first cell installs. Where there is no address yet: a clone, as Colab makes it.
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"].get("Repository")
PACKAGE = f"git+{ADDRESS}" if ADDRESS else "/content/kd2m_jax"
LIMIT = 400_000  # bytes of a notebook with its outputs
SECONDS = 90  # to run one, on two cores


def execute(notebook, folder, *, level=None):
    """Run all cells in a fresh kernel on the CPU, as one device, in an empty folder.

    Once more where a cell does not end: seen twice, with an idle kernel whose last message had not
    arrived, and the client waiting for it.
    """
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = environment(level=level) | {"PYTHONPATH": python_path}
    for last in (False, True):
        client = nbclient.NotebookClient(
            copy.deepcopy(notebook),
            timeout=SECONDS,  # of a cell
            startup_timeout=300,  # long, for a machine that does other things too
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
        )
        try:
            return client.execute(env=variables)
        except nbclient.exceptions.CellTimeoutError:
            if last:
                raise


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def pictures(notebook):
    return [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def test_every_notebook_is_listed():
    assert sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)
    assert sorted(p.stem for p in NOTEBOOKS.glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_is_in_step(name):
    script = jupytext.read(NOTEBOOKS / f"{name}.py")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    for kind in ("code", "markdown"):
        assert sources(notebook, kind) == sources(script, kind)


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < LIMIT
    assert pictures(notebook)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert str(Path.home()) not in nbformat.writes(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_installs_on_colab_alone(name, monkeypatch):
    first = sources(jupytext.read(NOTEBOOKS / f"{name}.py"), "code")[0]
    commands, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr("subprocess.run", lambda command: commands.append(command) or done)
    exec(first, {})
    assert commands == []
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    namespace = {}
    exec(first, namespace)
    assert commands and commands[0][-1] == namespace["PACKAGE"] == PACKAGE
    # The versions that are there stay, because a GPU plugin fits one version of JAX.
    assert {f"{p}=={version(p)}" for p in ("jax", "jaxlib", "flax", "numpy")} <= {*commands[0]}
    # The same cell in all, with the address in one place, and a way out where it fails.
    assert first == sources(jupytext.read(NOTEBOOKS / f"{NAMES[0]}.py"), "code")[0]
    assert first.count(namespace["PACKAGE"]) == 1
    done.returncode = 1
    with pytest.raises(RuntimeError, match="set PACKAGE above to the path of a clone"):
        exec(first, {})


@pytest.mark.parametrize("name", NAMES)
def test_one_title_and_no_placeholder(name):
    cells = sources(jupytext.read(NOTEBOOKS / f"{name}.py"), "markdown")
    lines = [line for cell in cells for line in cell.splitlines()]
    (title,) = (line.removeprefix("# ") for line in lines if re.match(r"#(\s|$)", line))
    assert title == TITLES[name]
    assert not re.search(r"\b(READ_|TODO|FIXME)", "\n".join(lines))
    assert not any(re.fullmatch(r"#+\s*", line) for line in lines)


def cell_with(text, name="reproduce_the_paper"):
    (cell,) = (c for c in sources(jupytext.read(NOTEBOOKS / f"{name}.py"), "code") if text in c)
    return cell


def leave_run(folder, **changed):
    config = {"dataset": "digits", "metric": "cw2", "coef": [1e-3], "task_coef": 1.0, "seed": 0}
    config |= {"stem": "cifar", **changed}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    phases = {"teacher": 0.9, "student": 0.8}
    if config["metric"] != "none":
        phases["distilled"] = 0.8 + 0.01 * config["seed"]
    lines = [{"phase": k, "step": 1, "epoch": 1, "test_accuracy": v} for k, v in phases.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.md").write_text("")


def test_reproduce_the_paper_reads_every_kind_of_run(tmp_path, capsys, monkeypatch):
    runs, cells = tmp_path / "runs", tmp_path / "runs/table/digits"
    for seed in (1, 2):
        leave_run(cells / f"seed{seed}/cw2", seed=seed)
        leave_run(cells / f"seed{seed}/none", seed=seed, metric="none", coef=[0.0])
    leave_run(runs / "alone", metric="jw2:beta=0.5", coef=["auto:0.1"])
    leave_run(runs / "sum", metric="kd+cw2", coef=[0.9, 1e-3], task_coef=0.1)
    leave_run(runs / "other", stem="imagenet", seed=1)
    leave_run(runs / "sum/previous-1", seed=9)
    leave_run(runs / "stopped", seed=8)
    (runs / "stopped/report.md").unlink()

    # The imports, the function that finds folders, then the cells that read.
    imports = "import json, numpy as np, matplotlib.pyplot as plt\nfrom scipy import stats\n"
    imports += "from collections import Counter\nfrom contextlib import suppress\n"
    found = ast.parse(cell_with("def finished_runs")).body
    (finder,) = (n for n in found if getattr(n, "name", "") == "finished_runs")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    space = {"RUNS": runs, "COLOURS": {"teacher": "b", "student": "y", "distilled": "g"}}
    for code in (imports, ast.unparse(finder), cell_with("def read_run"), cell_with("curves =")):
        exec(code, space)
    out = capsys.readouterr().out
    assert "6 of 7 finished runs" in out and "±" not in out.split("jw2:beta=0.5")[1]
    assert set(space["distilled"]) == {
        ("cw2", "0.001"),
        ("jw2:beta=0.5", "auto:0.1"),
        ("kd+cw2", "0.9,0.001; labels 0.1"),
    }
    assert re.search(r"cw2 .*0.001 +2 +81.50 ± 0.71 +\+1.50  \[-4.85, \+7.85\]", out)
    assert space["curves"]["cw2"].keys() == {1e-3}


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_time_and_makes_a_figure(name, tmp_path):
    # From the script, so that no committed output can stand in for one.
    start, used = time.perf_counter(), cpu_seconds()
    trains = name in ("bring_your_own", "distill_digits")  # the others compile, most of the time
    notebook = execute(jupytext.read(NOTEBOOKS / f"{name}.py"), tmp_path, level=int(trains))
    wall, used = time.perf_counter() - start, cpu_seconds() - used
    print(f"{name}: {wall:.0f} s, of which the processor worked {used:.0f} s")
    assert pictures(notebook)
    # On cores that others use too the wall clock says little of the notebook.
    assert min(wall, used) < SECONDS


def small(png):
    """Encode a PNG in base64 with 256 colours: a third of the bytes for line art."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def with_address(first_cell, package=PACKAGE):
    """Return the first cell's code with what it is to install."""
    return re.sub(r"^PACKAGE = .*$", f'PACKAGE = "{package}"', first_cell, flags=re.MULTILINE)


def test_the_address_is_put_in():
    first = sources(jupytext.read(NOTEBOOKS / f"{NAMES[0]}.py"), "code")[0]
    assert with_address(first) == first
    changed = with_address(first, "somewhere/else")
    assert [line for line in changed.splitlines() if line not in first.splitlines()] == [
        'PACKAGE = "somewhere/else"'
    ]


def put_address(name):
    """Write the address into a script and its notebook, whose outputs stay."""
    script = NOTEBOOKS / f"{name}.py"
    script.write_text(with_address(script.read_text()))
    notebook = nbformat.read(script.with_suffix(".ipynb"), 4)
    notebook.cells[0].source = with_address(notebook.cells[0].source)
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def write(name, folder):
    """Execute a script and write it with its outputs as a notebook."""
    notebook = execute(jupytext.read(NOTEBOOKS / f"{name}.py"), folder)
    notebook.metadata.pop("widgets", None)  # sliders show nothing without their kernel
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name}-{number}"  # not random: an unchanged cell makes no diff
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])
    nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    import tempfile

    if sys.argv[1:] == ["--address"]:
        for name in NAMES:
            put_address(name)
        sys.exit()
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            write(name, folder)
