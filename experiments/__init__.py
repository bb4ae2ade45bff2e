"""The experiments: short programs over the library, one per data set."""

import importlib.util
import sys

if importlib.util.find_spec("tyro") is None:  # of all that it takes the first to be missed
    sys.exit("error: the commands need more packages: pip install 'kd2m-jax[experiments]'")
