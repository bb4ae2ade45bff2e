"""How Sphinx builds the documentation: without network, and without a warning.

Two environment variables, which CI sets:
  KD2M_EXECUTE_NOTEBOOKS=1  run the notebooks instead of showing their stored output
  KD2M_FETCH_INVENTORIES=1  take other projects' lists of names from their sites
"""

import json
import os
import sys
from pathlib import Path

# Before JAX starts, which the docstrings' modules import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "_ext")]

import kd2m_jax  # noqa: E402
from kd2m_jax.internal import set_compiler_flags  # noqa: E402

project = "kd2m_jax"
author = "The kd2m_jax authors"
copyright = "2026, the kd2m_jax authors"
release = version = kd2m_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
    "sphinxcontrib.bibtex",
    "docstrings",  # this and the rest are in docs/_ext
    "names",
    "tables",
    "commands",
    "links",
]
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"
default_role = "py:obj"
exclude_patterns = ["_build", "_ext", "inventories", "jupyter_execute"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# The notebooks are copied beside the page that lists them, without the cell that installs on Colab.
for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
    notebook = json.loads(file.read_text())
    notebook["cells"][0]["metadata"]["tags"] = ["remove-cell"]
    text, copy = json.dumps(notebook), HERE / "tutorials" / file.name
    if not copy.exists() or copy.read_text() != text:
        copy.write_text(text)
EXECUTE = bool(os.environ.get("KD2M_EXECUTE_NOTEBOOKS"))
nb_execution_mode = "force" if EXECUTE else "off"
nb_execution_timeout = 300  # seconds per cell
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # sliders do nothing without a kernel, and no script from elsewhere
if EXECUTE:  # a kernel starts in an empty folder, and compiles as the commands do
    set_compiler_flags()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

# Names of other projects that our docstrings use: small files of our own, or the projects' own.
PROJECTS = {
    "python": "https://docs.python.org/3/",
    "jax": "https://docs.jax.dev/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
}
fetched = bool(os.environ.get("KD2M_FETCH_INVENTORIES"))
intersphinx_mapping = {
    name: (address, None if fetched else f"inventories/{name}.inv")
    for name, address in PROJECTS.items()
}

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes, domains and units
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
nitpick_ignore = [
    ("py:class", "kd2m_jax.adapters.Apply"),  # a protocol: Network's docstring spells it out
    ("py:class", "kd2m_jax.losses._catalogue.Published"),  # what `published` returns is documented
    ("py:class", "kd2m_jax.training._fit.M"),  # a type variable
]

html_theme = "sphinx_book_theme"
html_title = "kd2m_jax"
html_static_path = ["_static"]
html_css_files = ["kd2m.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_start": [],
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
    **({"repository_url": kd2m_jax.__url__} if kd2m_jax.__url__ else {}),
}
