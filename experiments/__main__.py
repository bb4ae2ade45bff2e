"""List the experiments: ``python -m experiments``."""

import ast
import pathlib

# In the order in which someone meets them.
NAMES = ("digits", "mnist", "cifar", "svhn", "images", "evaluate", "predict", "export")
NAMES += ("table", "tradeoff", "features", "bound", "bench")

if __name__ == "__main__":
    print("python -m experiments.NAME [--help], with NAME one of\n")
    for name in NAMES:
        here = pathlib.Path(__file__).parent
        file = here / name / "__main__.py" if (here / name).is_dir() else here / f"{name}.py"
        text = file.read_text()
        print(f"{name:<10}{(ast.get_docstring(ast.parse(text)) or '').splitlines()[0]}")
