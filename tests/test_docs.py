"""Every public name is documented, with an example (pytest runs them: --doctest-modules)."""

import importlib.util
import inspect
import re

import pytest

from kd2m_jax import losses

# Public modules, and where what they offer is written.
MODULES = {
    "kd2m_jax": "kd2m_jax",
    "kd2m_jax.losses": "kd2m_jax.losses",
    "kd2m_jax.models": ("kd2m_jax.models", "kd2m_jax._torch_weights"),
    "kd2m_jax.theory": "kd2m_jax.theory",
}


def public():
    """The functions and classes that users call."""
    for module in filter(importlib.util.find_spec, MODULES):
        home = importlib.import_module(module)
        names = getattr(home, "__all__", None) or [n for n in vars(home) if n[0] != "_"]
        for name in names:
            thing = getattr(home, name)
            ours = getattr(thing, "__module__", "").startswith(MODULES[module])
            if ours and (inspect.isfunction(thing) or inspect.isclass(thing)):
                yield pytest.param(thing, id=f"{module}.{name}")


def sections(doc):
    return set(re.findall(r"^(\w+):$", doc, re.MULTILINE))


@pytest.mark.parametrize("thing", list(public()))
def test_docstring(thing):
    doc = inspect.getdoc(thing) or ""
    first = doc.split("\n", 1)[0]
    assert first.endswith((".", ":", "?")) and len(first) <= 100, first
    if inspect.isfunction(thing):
        assert "Example" in sections(doc) and ">>>" in doc.split("Example:")[1]
        assert inspect.signature(thing).parameters.keys() <= set(re.findall(r"\w+", doc))


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
