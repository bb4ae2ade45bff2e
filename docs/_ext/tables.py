"""Tables that are made while the site is built: a page cannot disagree with code or numbers.

``metrics-table`` has every entry of the catalogue; ``results-table:: digits`` what
``python -m experiments.table`` wrote, as docs/results/digits.json; ``bench-table:: gaussian`` what
``python -m experiments.bench --suite=gaussian`` wrote, as docs/results/bench/gaussian.json.
"""

import json
import pathlib
from collections.abc import Sequence

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from experiments.common import tables
from experiments.studies import provenance, text
from kd2m_jax import losses

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def list_table(rows: Sequence[Sequence[str]], widths: str = "auto") -> list[str]:
    """Return the lines of a list-table, of a header and rows."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in rows:
        cells = [f"- {cell}".rstrip() for cell in row]
        lines += [f"   * {cells[0]}", *(f"     {cell}" for cell in cells[1:])]
    return lines


def metrics() -> list[str]:
    """Return the catalogue: name, formula, needs, source."""
    rows = [["name", "D", "also needs", "source"]]
    for name, info in losses.METRICS.items():
        link = f":py:obj:`{name} <kd2m_jax.losses.{info.function.__name__}>`"
        rows.append([link, f"``{info.formula}``", ", ".join(info.needs) or "–", info.source])
    return list_table(rows, "18 46 12 24")


def results(name: str) -> list[str]:
    """Return a study's command, its tables with what they say, and where they come from."""
    table = json.loads((RESULTS / f"{name}.json").read_text())
    lines = ["::", "", f"   {table['command']}", ""]
    for section, found in text.sections(table).items():
        # No line breaks inside a number with its deviation, or inside an interval.
        header, *rows = text.rows(found)
        rows = [[name, *(cell.replace(" ", "\u00a0") for cell in cells)] for name, *cells in rows]
        lines += [f"{text.title(section, found)}:", "", *list_table([header, *rows]), ""]
        lines += [text.sentence(found), ""]
    return [*lines, provenance.sentence(table)]


def bench(name: str) -> list[str]:
    """Return a suite's command, its table, which targets are met, and the machine."""
    suite = json.loads((RESULTS / "bench" / f"{name}.json").read_text())
    header, *rows = tables.cells(suite["rows"])
    versions = ", ".join(f"{key} {value}" for key, value in suite["versions"].items() if value)
    return [
        "::",
        "",
        f"   python -m experiments.bench --suite={name}",
        "",
        *list_table([header, *rows]),
        "",
        *(f"- {note}" for note in suite["notes"]),
        "",
        f"{suite['date']}, {suite['processor']}, {suite['cores']} cores, "
        f"Python {suite['python']}, {versions}.",
    ]


MAKERS = {"metrics-table": metrics, "results-table": results, "bench-table": bench}


class Table(Directive):
    """A directive for `eval-rst` whose content is reStructuredText that a function returns."""

    optional_arguments = 1

    def run(self):
        """Return what the text makes."""
        lines = MAKERS[self.name](*self.arguments)
        container = nodes.container()
        self.state.nested_parse(StringList(lines, "tables"), 0, container)
        return container.children


def setup(app: Sphinx):
    """Register with Sphinx."""
    for name in MAKERS:
        app.add_directive(name, Table)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
