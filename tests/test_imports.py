"""What may import what: losses know nothing of flax, the library nothing of experiments."""

import ast
import pathlib
import subprocess
import sys

import pytest

import kd2m_jax

ROOT = pathlib.Path(kd2m_jax.__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("kd2m_jax", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
library = pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("kd2m_jax")])

# Lower may not import higher, nor its like: losses <- networks <- step <- training.
LAYERS = [
    ("outputs", "_log", "_batches", "_locks", "_processes", "_compat"),
    ("losses",),
    ("theory",),
    ("networks", "models", "_checkpoints"),
    ("step",),
    ("parallel", "_evaluation"),
    ("training",),
]
SHELL_ONLY = {"tyro", "tensorflow_datasets", "tensorflow", "matplotlib", "tqdm", "tensorboardX"}


def imported(module):
    """Every module that one names in an import, wherever in it, dotted and absolute."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: absolute imports, so that this test sees them"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(module):
    return {name.split(".")[0] for name in imported(module)}


def layer(module):
    """Where in LAYERS a module of the library stands; None for others and for the package."""
    parts = module.split(".")
    if parts[0] != "kd2m_jax" or len(parts) < 2:
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)


@library
def test_the_library_imports_in_one_direction(module):
    assert packages(module).isdisjoint({"experiments", "tests", *SHELL_ONLY})
    if module == "kd2m_jax.__init__":
        return  # it names everything, for type checkers, and imports it when it is used
    own = module.split(".")[1]
    assert layer(module) is not None, f"say in LAYERS where {own} stands"
    for name in imported(module):
        if layer(name) is not None and name.split(".")[1] != own:
            assert layer(name) < layer(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("kd2m_jax.losses")])
def test_losses_are_arrays_and_nothing_else(module):
    assert packages(module).isdisjoint({"flax", "orbax", "chex"})
    ours = {name for name in imported(module) if name.startswith("kd2m_jax")}
    allowed = ("kd2m_jax.losses", "kd2m_jax.outputs")
    assert [name for name in ours if not name.startswith(allowed)] == []


NO_JAX = ["report", "folder", "cli", "table", "tradeoff", "intervals", "figures", "provenance"]


@pytest.mark.parametrize("module", NO_JAX)
def test_a_report_needs_no_jax(module):
    assert packages(f"experiments._common.{module}").isdisjoint({"jax", "flax", "optax", "orbax"})
    assert "jax" not in loaded(f"import experiments._common.{module}")


def test_sizes():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: n for module, n in lines.items() if n > 400} == {}
    mains = {m: n for m, n in lines.items() if m.startswith("experiments") and "_common" not in m}
    assert {module: n for module, n in mains.items() if n > 60} == {}


def loaded(code):
    """The top-level packages that are loaded after some code has run in a fresh interpreter."""
    report = "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-W", "ignore", "-c", code + report]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import kd2m_jax.losses", "from kd2m_jax import losses"])
def test_losses_load_neither_flax_nor_orbax(code):
    packages = loaded(code)
    assert "jax" in packages
    # Not by way of ott-jax either, which imports flax and matplotlib where they are installed.
    assert packages.isdisjoint({"flax", "orbax", *SHELL_ONLY})


def test_the_package_loads_what_is_used():
    assert loaded("import kd2m_jax; dir(kd2m_jax)").isdisjoint({"jax", "flax", "numpy"})
    # Orbax takes a second to load, and only fit(checkpoints=...) needs it.
    assert "orbax" not in loaded("import kd2m_jax; kd2m_jax.fit, kd2m_jax.make_train_step")


def test_every_public_name_resolves():
    assert set(kd2m_jax.__all__) == set(dir(kd2m_jax))
    for name in kd2m_jax.__all__:
        assert getattr(kd2m_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = kd2m_jax.fitt
    # What type checkers and editors see is what there is.
    tree = ast.parse(MODULES["kd2m_jax.__init__"].read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in ast.walk(checked) for alias in getattr(node, "names", [])}
    assert seen == set(kd2m_jax.__all__)
