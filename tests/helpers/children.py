"""The environment of a process that a test starts."""

import os

from kd2m_jax.internal import compiler_flags


def environment(devices=1, *, level=0):
    """Return one with so many fake devices, and LLVM's level; None is the user's.

    At level 0 programs compile cheaply and run slowly. At level 1 README's first command takes 14.3
    CPU s for 12 steps, 17.1 as users have it.
    """
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    chosen = compiler_flags(optimised=level is None)
    flags += [
        flag.replace("optimization_level=0", f"optimization_level={level}") for flag in chosen
    ]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
