"""How Sphinx builds the documentation: no network, no warning."""

import os

# Before JAX starts, which the docstrings' modules import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import kd2m_jax

project = "kd2m_jax"
author = "The kd2m_jax authors"
copyright = "2026, the kd2m_jax authors"
release = version = kd2m_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
bibtex_bibfiles = ["references.bib"]
nb_execution_mode = "off"  # the notebooks' stored outputs are checked by the tests
default_role = "py:obj"
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes, domains and units
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = "kd2m_jax"
html_theme_options = {"repository_url": kd2m_jax.__url__} if kd2m_jax.__url__ else {}
