"""How XLA compiles for the CPU: chosen in one place, before JAX starts."""

import importlib.metadata
import os

# Measured with jaxlib 0.10.2 on one core: the tests of the losses compile in 14.7 CPU seconds
# with it instead of 39.6, and losses and training steps run as fast within 5%, but for exact
# transport, which takes 1.15 to 1.6 times as long. jaxlib 0.11 no longer knows the flag, and a
# flag that XLA does not know ends the process.
_OLDER_CODE_GENERATOR = "--xla_cpu_use_fusion_emitters=false"
# XLA's own passes stay, LLVM's do not: half the time to compile, steps 13 times slower. For
# processes that run each program a few times.
_UNOPTIMISED = "--xla_backend_optimization_level=0"
# One piece of machine code per program, not one per core: 8% to 30% less CPU time to compile the
# losses and their gradients with jaxlib 0.10.2, and a step runs the same code. jaxlib 0.7.2 to
# 0.12.0 were seen to know it.
_IN_ONE_PIECE = "--xla_cpu_parallel_codegen_split_count=1"


def compiler_flags(*, optimised: bool = True) -> list[str]:
    """List XLA's flags for short compile times with the installed jaxlib."""
    major, minor = map(int, importlib.metadata.version("jaxlib").split(".")[:2])
    flags = [_OLDER_CODE_GENERATOR] if (major, minor) < (0, 11) else []
    if not optimised:
        flags += [_UNOPTIMISED] + ([_IN_ONE_PIECE] if (major, minor) < (0, 13) else [])
    return flags


def set_compiler_flags(*, optimised: bool = True) -> None:
    """Append `compiler_flags` to XLA_FLAGS, except those that the user has set there."""
    given = os.environ.get("XLA_FLAGS", "")
    names = {flag.split("=")[0] for flag in given.split()}
    chosen = [f for f in compiler_flags(optimised=optimised) if f.split("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *chosen])


def compiler_flags_in_force() -> list[str]:
    """List the flags in XLA_FLAGS that decide the machine code, and so a result's last digits."""
    given = os.environ.get("XLA_FLAGS", "").split()
    return [flag for flag in given if "host_platform_device_count" not in flag]
