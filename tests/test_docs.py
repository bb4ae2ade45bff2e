"""Every public name is documented, with an example (pytest runs them: --doctest-modules)."""

import importlib.util
import inspect
import re

import pytest

from kd2m_jax import losses, models

# Public modules, and where what they offer is written.
MODULES = {
    "kd2m_jax": "kd2m_jax",
    "kd2m_jax.losses": "kd2m_jax.losses",
    "kd2m_jax.models": "kd2m_jax.models",
    "kd2m_jax.theory": "kd2m_jax.theory",
}


# Exceptions to the rules below, each with its reason.
NO_ARRAYS = {  # they take and give no arrays, so there are no shapes to name
    "EarlyStopping", "WeightAverage",
    "get_metric", "metric_sum", "from_linen", "from_nnx", "load_torch_weights", "Metric",
    "MetricSum", "MetricInfo", "Network", "FitResult", "published", "restore",
}  # fmt: skip
RESULTS = {"Bound", "LossTerms", "MetricInfo", "Metric", "MetricSum", "TransportInfo"}
# what a function returns, and shows in its own example


def public():
    """Yield the functions, classes and constructors that users call, each once."""
    seen = set()
    for module in filter(importlib.util.find_spec, MODULES):
        home = importlib.import_module(module)
        names = getattr(home, "__all__", None) or [n for n in vars(home) if n[0] != "_"]
        for name in names:
            thing = getattr(home, name)
            ours = getattr(thing, "__module__", "").startswith(MODULES[module])
            callable_ = inspect.isfunction(thing) or inspect.isclass(thing)
            if ours and callable_ and id(thing) not in seen:
                seen.add(id(thing))
                yield pytest.param(name, thing, id=f"{module}.{name}")


def sections(doc):
    return set(re.findall(r"^(\w+):$", doc, re.MULTILINE))


def kind(thing):
    if inspect.isfunction(thing):
        return "preset" if made_by(thing) else "function"
    return "error" if issubclass(thing, BaseException) else "class"


def made_by(thing):
    """Return the class of networks of which a preset makes one size; None for other functions."""
    given = inspect.signature(thing).return_annotation
    return given if given in (models.ResNet, models.MLP) else None


def lacks(name, thing):
    """Return what a public name's docstring does not say."""
    doc = inspect.getdoc(thing) or ""
    found, what = sections(doc), kind(thing)
    first = doc.split("\n", 1)[0]
    missing = {
        "a first line that is a sentence": first.endswith((".", ":", "?")) and len(first) <= 100,
        "shapes": name in NO_ARRAYS or re.search(r"\[[a-z0-9.]+[,\]]|scalar", doc),
    }
    if what == "preset":  # the class that it calls has the rest
        missing["the class that it is"] = f"{made_by(thing).__name__}(" in doc
    if what in ("function", "preset"):
        said = set(re.findall(r"\w+", doc))
        missing["each argument"] = inspect.signature(thing).parameters.keys() <= said
        missing["what it returns"] = "Returns" in found
    if what == "function":
        missing["errors"] = "Raises" in found
    if what == "error":
        missing["shapes"] = True
        missing["when it is raised"] = "raises it" in doc
    if what == "class":
        missing["its fields or arguments"] = found & {"Args", "Attributes"} or "as of `" in doc
    if what in ("function", "error") or (what == "class" and name not in RESULTS):
        missing["an example"] = "Example" in found and ">>>" in doc.split("Example:")[1]
    return [part for part, there in missing.items() if not there]


@pytest.mark.parametrize(("name", "thing"), list(public()))
def test_docstring(name, thing):
    assert lacks(name, thing) == []


def test_a_docstring_without_one_of_them_is_noticed():
    def bare(z_s):
        """Stand for a loss."""

    assert lacks("bare", bare) == [
        "shapes", "each argument", "what it returns", "errors", "an example"
    ]  # fmt: skip

    def preset(num_classes) -> models.MLP:
        """Stand for a network."""

    assert lacks("preset", preset) == [
        "shapes", "the class that it is", "each argument", "what it returns"
    ]  # fmt: skip


@pytest.mark.parametrize("name", losses.METRICS)
def test_loss_docstring(name):
    function = losses.METRICS[name].function
    doc = inspect.getdoc(function)
    assert {"Args", "Returns", "Raises", "Example", "References"} <= sections(doc)
    before, rest = doc.split("\nArgs:", 1)
    assert "``" in before, "the formula comes before the arguments"
    arguments, returns = rest.split("\nReturns:", 1)
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^  .*\b{parameter}\b.*: ", arguments, re.MULTILINE), parameter
    assert re.search(r"squared|nats|dimensionless|no unit", doc), "in what unit is the value?"
    assert "float32" in returns.split("\nRaises:")[0]
    references = doc.split("\nReferences:")[1]
    assert re.search(r"\d{4}|`\w+`", references), "a year, or the loss whose reference it shares"
