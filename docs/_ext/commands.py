"""Every command's flags, from the parsers that the commands have."""

import runpy
import sys
import warnings
from unittest import mock

import tyro
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from experiments.__main__ import NAMES
from experiments.common import cli

TRAINS = ("mnist", "cifar", "svhn", "images")  # what they share stands with digits


def described(name: str):
    """Return the summary of a command, and its flags by group: title, {flag: (metavar, help)}."""
    given = {}

    def main(defaults, run, *, module, description):
        given.update(defaults=defaults, description=description)

    with (
        mock.patch.object(cli, "main", main),
        mock.patch.object(sys, "argv", [name]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # it may have been imported before
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(type(given["defaults"]), default=given["defaults"])
    groups = []
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.option_strings != ["-h", "--help"]]
        flags = {a.option_strings[-1] if a.option_strings else a.dest: a for a in actions}
        groups.append((group.title or "", {f: shown(a) for f, a in flags.items()}))
    return given["description"], groups


def shown(action) -> tuple[str, str]:
    """Return a flag's placeholder, and its help as plain text."""
    metavar = action.metavar or ""
    metavar = " ".join(metavar) if isinstance(metavar, tuple) else str(metavar)
    return metavar.replace("{", "").replace("}", "").replace(",", "|"), str(action.help or "")


def escaped(text: str) -> str:
    r"""Take what a page would read as markup literally.

    >>> escaped("a * of `b`")
    'a \\* of \\`b\\`'
    """
    return "".join(f"\\{c}" if c in "\\*`|_" else c for c in text)


def section(name: str, known: dict[str, tuple[str, str]]) -> list[str]:
    """Return a command's lines: its own summary, then each flag that is not known yet."""
    description, groups = described(name)
    summary, _, rest = description.partition("\n\n")
    command, _, prose = rest.partition("\n\n")
    lines = [f".. program:: {name}", "", summary.replace("`", ""), ""]
    lines += [".. code-block:: text", "", f"   {command.strip()}", "", escaped(prose), ""]
    left = False
    for title, flags in groups:
        new = {flag: what for flag, what in flags.items() if known.get(flag) != what}
        left |= len(new) < len(flags)
        if new and title not in ("", "options"):
            lines += [f".. rubric:: {title.removesuffix(' options').capitalize()}", ""]
        for flag, (metavar, text) in new.items():
            lines += [f".. option:: {flag} {metavar}".rstrip(), "", f"   {escaped(text)}", ""]
    if left:
        lines += ["All other flags are those of ``digits``.", ""]
    return lines


class Commands(Directive):
    """``commands``, in ``eval-rst``: a section for each."""

    def run(self):
        """Return the sections."""
        shared = {flag: what for _, flags in described("digits")[1] for flag, what in flags.items()}
        found = []
        for name in NAMES:
            part = nodes.section(ids=[f"kd2m-{name}"], names=[f"kd2m {name}"])
            part += nodes.title("", f"kd2m {name}")
            lines = section(name, shared if name in TRAINS else {})
            self.state.nested_parse(StringList(lines, name), 0, part, match_titles=1)
            found.append(part)
        return found


def setup(app: Sphinx):
    """Register with Sphinx."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
