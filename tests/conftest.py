"""Settings that must stand before JAX starts: the CPU, seen as four devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

# Broadcasting [n] against [n, d] by accident is the commonest mistake in a loss.
jax.config.update("jax_numpy_rank_promotion", "raise")
