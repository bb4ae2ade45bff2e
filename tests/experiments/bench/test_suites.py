"""Every suite that --suite offers is in the table."""

import inspect

import pytest

from experiments.bench import suites


@pytest.mark.parametrize("name", suites.NAMES)
def test_a_suite_takes_its_folder_and_repeats(name):
    if "torch" in name:
        pytest.importorskip("torch")
    suite = suites.suite(name)
    assert suite.__name__ == name.replace("-", "_")
    first, *others = inspect.signature(suite).parameters
    assert first == "out" and "repeats" in others
