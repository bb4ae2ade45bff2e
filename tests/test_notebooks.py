"""The notebooks: each .ipynb in step with its script, small, and running from top to bottom.

After a change to a script, ``python tests/test_notebooks.py [NAME ...]`` brings its notebook in
step, executes it and writes the outputs.
"""

import base64
import io
import os
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("metrics_playground", "bring_your_own", "distill_digits", "reproduce_the_paper")
LIMIT = 400_000  # bytes of a notebook with its outputs


def execute(notebook, folder):
    """Run all cells in a fresh kernel on the CPU, as one device, in an empty folder."""
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": python_path}
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    return client.execute(env=environment)


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
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, **options: commands.append(command))
    exec(first, {})
    assert commands == []
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    namespace = {}
    exec(first, namespace)
    assert commands and commands[0][-1] == namespace["PACKAGE"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_makes_a_figure(name, tmp_path):
    # From the script, so that no committed output can stand in for one.
    notebook = execute(jupytext.read(NOTEBOOKS / f"{name}.py"), tmp_path)
    assert pictures(notebook)


def small(png):
    """A PNG in base64 with 256 colours: a third of the bytes for line art."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


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

    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            write(name, folder)
