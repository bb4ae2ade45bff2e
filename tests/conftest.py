"""Settings that must stand before JAX starts: the CPU, seen as four devices."""

import contextlib
import gc
import os
import pathlib
import tempfile

from kd2m_jax.internal import set_compiler_flags

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what the tests do, so they run unoptimised machine code.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
set_compiler_flags(optimised=False)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# A worker has one core: the threads of OpenBLAS and OpenMP would wait for one another. The notebook
# with t-SNE takes 53 CPU s for 88 beside other tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No traceback beside each operation: a tenth of the time of a test that compiles.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

# Only after the import: for the experiments that tests start as processes of their own, which
# would keep their programs in the user's home.
programs = tempfile.TemporaryDirectory(prefix="kd2m-jax-programs-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Broadcasting [n] against [n, d] by accident is the commonest mistake in a loss.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Workers would read programs that the other one is writing. Only their children keep any.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_collection_finish(session):
    """Let the collector pass over what imports made, and run seldom: another tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


# Of the 65,530 pieces of memory that Linux lets a process map. Each compiled program maps some.
MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Unload compiled programs after a module that leaves many: the limit ends the process.

    And let the collector pass over what earlier modules left: otherwise each collection that a
    test asks for takes a second.
    """
    gc.collect()
    gc.freeze()
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """Return a folder with the real data sets of this machine, decoded once for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "real"
    for info in pathlib.Path(os.environ.get("KD2M_DATA_DIR", SHARED)).glob("*/*/dataset_info.json"):
        link = root / info.parts[-3] / info.parts[-2]
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(info.parent.absolute())
    yield root
    for arrays in root.glob("*/.*.arrays.npz"):  # 200 MB, which pytest would keep
        arrays.unlink(missing_ok=True)
