"""Settings that must stand before JAX starts: the CPU, seen as four devices."""

import os
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


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Unload a module's compiled programs: each maps memory, of which Linux grants 65,530 pieces.

    With those of some 500 tests in one process the next one to be compiled ends it.
    """
    yield
    jax.clear_caches()
