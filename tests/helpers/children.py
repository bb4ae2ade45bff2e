"""The environment of a process that a test starts."""

import os

from kd2m_jax.internal import compiler_flags


def environment(devices=1, *, optimised=False):
    """Return one with so many fake devices, in which programs compile cheaply and run slowly."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    flags += compiler_flags(optimised=optimised)
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
