"""What may import what, and how long a module and a function may be."""

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

# Lower may not import higher, nor its like: losses <- adapters <- training.
LAYERS = [
    ("_outputs", "errors", "_compat", "_compiler", "_batch_norm", "callbacks"),
    ("losses", "_locks"),
    ("theory", "adapters", "models"),
    ("teachers", "_capture", "_equinox", "_projector"),
    ("training",),
    ("internal",),
]
# The floors of kd2m_jax.training, likewise.
FLOORS = [
    ("_processes", "_programs", "_auto_coef", "_averages", "_records", "_labels"),
    ("_preprocess", "_scores"),
    ("_body",),
    ("_step", "_checkpoints", "_examples"),
    ("_streams", "_identity", "_students"),
    ("_batches", "_parallel", "_evaluation"),
    ("_source",),
    ("_plan",),
    ("_progress", "_session"),
    ("_fit",),
    ("_restore", "_predict"),
]
SHELL_ONLY = {"tyro", "tensorflow_datasets", "tensorflow", "matplotlib", "tensorboardX"}


def imported(module):
    """Every module that one names in an import, wherever in it, dotted and absolute."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("experiments") for alias in node.names), module
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = absolute(module, node)
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def absolute(module, node):
    """Return what an import names. Those of the experiments are relative: the wheel moves them."""
    inside = module.startswith("experiments")
    if node.level == 0:
        assert not (inside and node.module.startswith("experiments")), f"{module}: {node.module}"
        return node.module
    assert inside, f"{module}: absolute imports in the library"
    is_package = MODULES[module].name == "__init__.py"
    above = module.split(".")[: len(module.split(".")) - node.level + is_package]
    return ".".join([*above, *filter(None, [node.module])])


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
    if module in ("kd2m_jax.__init__", "kd2m_jax.__main__"):
        return  # one names everything and imports it when it is used, the other is the command
    own = module.split(".")[1]
    assert layer(module) is not None, f"say in LAYERS where {own} stands"
    for name in imported(module):
        if layer(name) is not None and name.split(".")[1] != own:
            assert layer(name) < layer(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("kd2m_jax.training._")])
def test_training_stands_on_lower_floors(module):
    def floor(name):
        return next(i for i, names in enumerate(FLOORS) if name.split(".")[2] in names)

    if module.endswith("__init__"):
        return
    inner = {n for n in imported(module) if n.count(".") >= 2 and n.startswith("kd2m_jax.training")}
    for name in inner:
        same = name.split(".")[2] == module.split(".")[2]
        assert same or floor(name) < floor(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("kd2m_jax.losses")])
def test_losses_are_arrays_and_nothing_else(module):
    assert packages(module).isdisjoint({"flax", "orbax", "chex"})
    ours = {name for name in imported(module) if name.startswith("kd2m_jax")}
    allowed = ("kd2m_jax.losses", "kd2m_jax._outputs", "kd2m_jax._compat")
    assert [name for name in ours if not name.startswith(allowed)] == []


# The rooms of the experiments: lower may not import higher, nor a room of its own height.
ROOMS = [
    ("common",),
    ("data",),
    ("runs",),
    ("digits", "mnist", "cifar", "svhn", "images"),
    ("analysis", "studies", "bench"),
    ("table", "tradeoff", "regimes", "features", "bound", "evaluate", "predict", "export"),
    ("__main__", "__init__"),
]


def room(module):
    """Return the name of the room, or of the main, that a module of the experiments is in."""
    parts = module.split(".")
    return parts[1] if parts[0] == "experiments" and len(parts) > 1 else None


def height(name):
    return next(i for i, rooms in enumerate(ROOMS) if name in rooms)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("experiments")])
def test_a_room_stands_on_lower_ones(module):
    assert imports_above(module, imported(module)) == []


def imports_above(module, names):
    """Return the imports of a module that lead to a room that is not lower than its own."""
    own = room(module)
    others = {name for name in names if room(name) not in (None, own)}
    return sorted(name for name in others if height(room(name)) >= height(own))


def test_an_import_of_a_higher_room_is_noticed():
    assert imports_above("experiments.data.load", ["experiments.runs.build"]) != []
    assert imports_above("experiments.studies.grid", ["experiments.analysis.bound"]) != []
    assert imports_above("experiments.studies.grid", ["experiments.digits"]) == []


def needed_at_run_time(tree):
    """All nodes but those under ``if TYPE_CHECKING``; imports inside functions are among them."""
    for node in ast.iter_child_nodes(tree):
        checked = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        children = node.orelse if checked else [node]
        for child in children:
            yield child
            yield from needed_at_run_time(child)


def graph(sources):
    """Which modules each module imports, of those that there are sources of."""
    names = {name.removesuffix(".__init__") for name in sources}
    edges = {}
    for module, source in sources.items():
        found = set()
        for node in needed_at_run_time(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    one = f"{node.module}.{alias.name}"
                    found.add(one if one in names else node.module)
        edges[module.removesuffix(".__init__")] = found & names
    return edges


def circle(edges):
    """One circle of imports, as a list of modules; empty where there is none."""
    done = set()

    def walk(module, path):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := walk(module, []))), [])


def test_there_is_no_circle_of_imports():
    assert circle(graph({name: path.read_text() for name, path in MODULES.items()})) == []


def test_a_circle_of_imports_is_noticed():
    first = "def f():\n    from p import b\n"  # inside a function, too
    assert circle(graph({"p.a": first, "p.b": "import p.a"})) == ["p.a", "p.b"]
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import c\n"
    assert circle(graph({"p.a": typed, "p.b": "import p.a"})) == []
    assert circle(graph({"p.a": typed + "else:\n    import p.b", "p.b": "import p.a"})) != []


def test_own_modules_are_imported_openly():
    """Those that resolve the library's names lazily say them to type checkers too.

    The one exception is the command, which looks for the experiments in the wheel and in a clone.
    """
    by_name = [m for m, path in MODULES.items() if "import_module" in path.read_text()]
    lazy = ["kd2m_jax.__init__", "kd2m_jax.internal", "kd2m_jax.training.__init__"]
    assert sorted(by_name) == sorted(["kd2m_jax.__main__", *lazy])


def crossings(module, source):
    """Return the private names that a module takes from another package of ours.

    From the library to the experiments or back, and from one module of the experiments to another.
    """
    tree, ours, found = ast.parse(source), {}, []
    package = module.split(".")[0]

    def crosses(name):
        other = name.split(".")[0]
        return other != package or (package == "experiments" and name != module)

    def private(name):
        return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            home = getattr(node, "module", None)
            for alias in node.names:
                name = f"{home}.{alias.name}" if home else alias.name
                if name.split(".")[0] in ("kd2m_jax", "experiments"):
                    ours[alias.asname or alias.name.split(".")[0]] = name
                    if private(name) and crosses(home or name):
                        found.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in ours and crosses(ours[base.id]):
                found.append(f"{ours[base.id]}: {node.attr}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_crosses_the_border(module):
    assert crossings(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from kd2m_jax._locks import locked", 1),
        ("from kd2m_jax.losses import _gaussian", 1),
        ("from kd2m_jax import losses\nlosses._metrics.spelled", 1),
        ("import kd2m_jax._locks", 1),
        ("from experiments.runs.build import _metric", 1),
        ("from experiments.runs import build\nbuild._metric", 1),
        ("import kd2m_jax\nkd2m_jax.__version__", 0),
        ("from kd2m_jax.internal import locked", 0),
        ("import tqdm\ntqdm._lock", 0),
    ],
)
def test_a_private_name_that_crosses_is_noticed(source, count):
    assert len(crossings("experiments.runs.train", source)) == count


NO_JAX = [m for m in MODULES if m.startswith("experiments.common.")]
NO_JAX += ["experiments.data.specs", "experiments.data.load"]
NO_JAX += [f"experiments.runs.{m}" for m in ("settings", "configuration", "folder", "report")]
NO_JAX += [
    f"experiments.studies.{m}"
    for m in ("grid", "intervals", "provenance", "table", "text", "latex", "tradeoff")
]


@pytest.mark.parametrize("module", NO_JAX)
def test_a_report_imports_no_jax(module):
    assert packages(module).isdisjoint({"jax", "flax", "optax", "orbax"})


def test_a_report_loads_no_jax():
    """All in one process, which takes a second: it names the first that does."""
    each = [
        f"import {m.removesuffix('.__init__')}; assert 'jax' not in sys.modules" for m in NO_JAX
    ]
    assert "jax" not in loaded("import sys; " + "; ".join(each))


PACKAGES = [m for m in MODULES if m.startswith("experiments.") and m.endswith(".__init__")]


@pytest.mark.parametrize("module", PACKAGES)
def test_a_room_loads_nothing_by_itself(module):
    ours = [name for name in imported(module) if name.split(".")[0] not in sys.stdlib_module_names]
    assert ours == []


# Three exceptions are allowed. The signatures of these two alone have 25 lines.
LONG = {"kd2m_jax.training._fit.fit", "kd2m_jax.training._plan.make_plan"}


def functions(tree, prefix=""):
    """Every function, with its dotted name, and methods and inner functions too."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(node, f"{name}." if inner else prefix)


def length(function):
    """Return the lines of a function, without its docstring."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def parameters(function):
    a = function.args
    return len([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))])


def test_sizes():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: n for module, n in lines.items() if n > 400} == {}
    mains = {m: n for m, n in lines.items() if m.startswith("experiments") and m.count(".") == 1}
    mains["experiments.bench.__main__"] = lines["experiments.bench.__main__"]
    assert {module: n for module, n in mains.items() if n > 60} == {}
    every = {
        f"{module}.{name}": function
        for module, path in MODULES.items()
        for name, function in functions(ast.parse(path.read_text()))
    }
    long = {name: length(function) for name, function in every.items() if length(function) > 60}
    assert long.keys() == LONG and len(LONG) <= 3, long
    private = {n: f for n, f in every.items() if f.name[0] == "_" and not f.name.startswith("__")}
    assert {n: parameters(f) for n, f in private.items() if parameters(f) > 10} == {}


def test_lengths_do_not_count_docstrings():
    code = 'class A:\n  def f(self, a, *b, c, **d):\n    """One.\n\n    Two."""\n    return a\n'
    [(name, function)] = functions(ast.parse(code))
    assert (name, length(function), parameters(function)) == ("A.f", 2, 5)


def loaded(code):
    """Return the top-level packages that code loads in a fresh interpreter."""
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
