"""List every address outside the site in links.txt: CI shows it, and nothing is fetched."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx


def collect(app: Sphinx, doctree, docname):
    """Remember a page's addresses."""
    found = app.builder.__dict__.setdefault("kd2m_links", {})
    for reference in doctree.findall(nodes.reference):
        uri = reference.get("refuri", "")
        if uri.startswith(("http://", "https://")):
            found.setdefault(uri.partition("#")[0], set()).add(docname)


def write(app: Sphinx, exception):
    """Write all addresses with the pages that have them."""
    found = app.builder.__dict__.get("kd2m_links", {})
    if exception is None and found:
        lines = [f"{uri}  ({', '.join(sorted(pages))})\n" for uri, pages in sorted(found.items())]
        (Path(app.outdir) / "links.txt").write_text("".join(lines))


def setup(app: Sphinx):
    """Register with Sphinx."""
    app.connect("doctree-resolved", collect)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
