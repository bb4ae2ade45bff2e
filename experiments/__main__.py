"""List the experiments: ``python -m experiments``."""

import ast
import os
import pathlib
import sys

from .common.errors import command

# In the order in which someone meets them.
NAMES = ("digits", "mnist", "cifar", "svhn", "images", "evaluate", "predict", "export")
NAMES += ("table", "tradeoff", "regimes", "features", "bound", "bench")


def listed() -> str:
    """Return a line for each, the first of its docstring."""
    lines = [f"{command('experiments.NAME')} [--help], with NAME one of\n"]
    here = pathlib.Path(__file__).parent
    for name in NAMES:
        file = here / name / "__main__.py" if (here / name).is_dir() else here / f"{name}.py"
        doc = ast.get_docstring(ast.parse(file.read_text())) or ""
        lines.append(f"{name:<10}{doc.splitlines()[0]}")
    return "\n".join(lines)


def show() -> None:
    """Print the list; into a closed pipe, say of head, it is quiet."""
    try:
        print(listed(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    show()
