"""The experiments' commands in this process: what a shell sees of them, without their imports."""

import contextlib
import io
import os
import runpy
import sys
import warnings
from unittest import mock


def call(where, command, *flags, status=0):
    """Run ``python -m experiments.COMMAND`` in a folder; return its output, or its errors."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(where),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [command, *flags]),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of runpy, that a test has imported the module
        try:
            runpy.run_module(f"experiments.{command}", run_name="__main__")
        except SystemExit as stop:
            found = stop.code or 0
    assert found == status, out.getvalue() + err.getvalue()
    return out.getvalue() if status == 0 else err.getvalue()
