"""The table of metrics, from the catalogue: a page cannot disagree with the code."""

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from kd2m_jax import losses


def rows() -> list[str]:
    """Return the lines of a list-table: name, formula, needs, source."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 18 46 12 24", ""]
    lines += ["   * - name", "     - D", "     - also needs", "     - source"]
    for name, info in losses.METRICS.items():
        function = info.function.__name__
        lines += [
            f"   * - :py:obj:`{name} <kd2m_jax.losses.{function}>`",
            f"     - ``{info.formula}``",
            f"     - {', '.join(info.needs) or '–'}",
            f"     - {info.source}",
        ]
    return lines


class MetricsTable(Directive):
    """``metrics-table``, in ``eval-rst``: every entry of METRICS."""

    def run(self):
        """Return the table."""
        container = nodes.container()
        self.state.nested_parse(StringList(rows(), "METRICS"), 0, container)
        return container.children


def setup(app: Sphinx):
    """Register with Sphinx."""
    app.add_directive("metrics-table", MetricsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
