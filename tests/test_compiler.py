"""XLA's flags: by the version of jaxlib, and never in place of the user's."""

import importlib.metadata

import pytest

from kd2m_jax import _compiler


@pytest.mark.parametrize(
    ("version", "emitters", "pieces"),
    [
        ("0.7.2", True, True),
        ("0.10.2", True, True),
        ("0.11.0", False, True),
        ("0.12.0.1", False, True),
        ("0.13.0", False, False),
        ("1.0.0", False, False),
    ],
)
def test_a_flag_is_set_only_where_jaxlib_knows_it(version, emitters, pieces, monkeypatch):
    """An unknown one ends the process."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    flags = _compiler.compiler_flags()
    assert flags == ["--xla_cpu_use_fusion_emitters=false"] * emitters
    more = _compiler.compiler_flags(optimised=False)
    assert more[: len(flags) + 1] == [*flags, "--xla_backend_optimization_level=0"]
    assert more[len(flags) + 1 :] == ["--xla_cpu_parallel_codegen_split_count=1"] * pieces


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["--xla_cpu_use_fusion_emitters=false"]),
        ("--xla_a=1", ["--xla_a=1", "--xla_cpu_use_fusion_emitters=false"]),
        ("--xla_cpu_use_fusion_emitters=true", ["--xla_cpu_use_fusion_emitters=true"]),
    ],
)
def test_flags_are_appended_to_the_users(given, expected, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given:
        monkeypatch.setenv("XLA_FLAGS", given)
    _compiler.set_compiler_flags()
    assert _compiler.os.environ["XLA_FLAGS"].split() == expected
    _compiler.set_compiler_flags()
    assert _compiler.os.environ["XLA_FLAGS"].split() == expected


def test_the_number_of_fake_devices_is_no_compiler_setting(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_a=1")
    assert _compiler.compiler_flags_in_force() == ["--xla_a=1"]
