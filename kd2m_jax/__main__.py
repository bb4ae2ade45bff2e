"""The command ``kd2m``: the experiments by their names, ``kd2m digits --metric=jw2``."""

import importlib.util
import runpy
import sys
from typing import Any


def main() -> None:
    """Run the experiment that the first argument names; a mistake is one line and status 2."""
    # In the wheel they are inside this package, beside a clone (or an editable install) next to it.
    places = ("kd2m_jax.experiments", "experiments")
    package = next((name for name in places if importlib.util.find_spec(name)), None)
    if package is None:
        _fail("the experiments are not installed: use the wheel, or a clone of the project")
    if importlib.util.find_spec("tyro") is None:
        _fail("the commands need more packages: pip install 'kd2m-jax[experiments]'")
    name, *flags = sys.argv[1:] or ["--help"]
    if name == "--version":
        from kd2m_jax import __version__

        print(f"kd2m_jax {__version__}")
        return
    errors: Any = importlib.import_module(f"{package}.common.errors")
    errors.BY_NAME = True
    listing = importlib.import_module(f"{package}.__main__")
    if name in ("-h", "--help"):
        listing.show()
        return
    if name not in listing.NAMES:
        from kd2m_jax.internal import did_you_mean

        _fail(f"there is no command {name!r}: {did_you_mean(name, listing.NAMES)}")
    sys.argv = [f"kd2m {name}", *flags]
    runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
