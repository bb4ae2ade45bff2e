"""Settings that must stand before JAX starts: the CPU, seen as four devices."""

import os
import pathlib
import tempfile

from kd2m_jax.internal import set_compiler_flags

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what the tests do, so they run unoptimised machine code.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
set_compiler_flags(optimised=False)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import pytest  # noqa: E402

# Only after the import: for the experiments that tests start as processes of their own, which
# would keep their programs in the user's home.
programs = tempfile.TemporaryDirectory(prefix="kd2m-jax-programs-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name

# Broadcasting [n] against [n, d] by accident is the commonest mistake in a loss.
jax.config.update("jax_numpy_rank_promotion", "raise")


# Of the 65,530 pieces of memory that Linux lets a process map. Each compiled program maps some.
MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Unload compiled programs after a module that leaves many: the limit ends the process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
