"""List the experiments: ``python -m experiments``."""

import ast
import pathlib

for path in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
    summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n", 1)[0]
    print(f"python -m experiments.{path.stem:<8} {summary}")
