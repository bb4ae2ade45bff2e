"""List the experiments: ``python -m experiments``."""

import ast
import pathlib

# In the order in which someone meets them.
NAMES = ("digits", "mnist", "cifar", "svhn", "table", "tradeoff", "features", "bound", "bench")

if __name__ == "__main__":
    print("python -m experiments.NAME [--help], with NAME one of\n")
    for name in NAMES:
        text = pathlib.Path(__file__).with_name(f"{name}.py").read_text()
        print(f"{name:<10}{(ast.get_docstring(ast.parse(text)) or '').splitlines()[0]}")
