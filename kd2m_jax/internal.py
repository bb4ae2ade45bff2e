"""What our own experiments use, and what nobody is promised: names may change in any version.

Names are resolved when they are first used, so a caller that needs a lock does not load JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd2m_jax._compat import layer_list as layer_list
    from kd2m_jax._compiler import compiler_flags as compiler_flags
    from kd2m_jax._compiler import compiler_flags_in_force as compiler_flags_in_force
    from kd2m_jax._compiler import set_compiler_flags as set_compiler_flags
    from kd2m_jax._locks import is_address as is_address
    from kd2m_jax._locks import locked as locked
    from kd2m_jax.adapters import as_network as as_network
    from kd2m_jax.losses._checks import did_you_mean as did_you_mean
    from kd2m_jax.losses._metrics import Unsaid as Unsaid
    from kd2m_jax.losses._mmd import KERNELS as KERNELS
    from kd2m_jax.losses._polar import by_products as by_products
    from kd2m_jax.losses._polar import by_svd as by_svd
    from kd2m_jax.losses._polar import tolerance as tolerance
    from kd2m_jax.losses._resolve import for_cpu as for_cpu
    from kd2m_jax.losses._solvers import DEFAULT_SOLVER as DEFAULT_SOLVER
    from kd2m_jax.losses._spelling import spelled as spelled
    from kd2m_jax.losses._spelling import terms as terms
    from kd2m_jax.models._torch_weights import local_file as local_file
    from kd2m_jax.training._auto_coef import auto_ratio as auto_ratio
    from kd2m_jax.training._batches import Batches as Batches
    from kd2m_jax.training._batches import steps_per_call as steps_per_call
    from kd2m_jax.training._batches import steps_per_epoch as steps_per_epoch
    from kd2m_jax.training._body import step_body as step_body
    from kd2m_jax.training._checkpoints import Checkpoints as Checkpoints
    from kd2m_jax.training._labels import balanced as balanced
    from kd2m_jax.training._processes import ProcessLost as ProcessLost
    from kd2m_jax.training._processes import after_first as after_first
    from kd2m_jax.training._processes import by_first as by_first
    from kd2m_jax.training._processes import gathered as gathered
    from kd2m_jax.training._processes import held_by_first as held_by_first
    from kd2m_jax.training._processes import is_first as is_first
    from kd2m_jax.training._processes import start as start
    from kd2m_jax.training._processes import watched as watched
    from kd2m_jax.training._progress import Progress as Progress
    from kd2m_jax.training._records import Records as Records
    from kd2m_jax.training._scores import accuracy as accuracy
    from kd2m_jax.training._scores import calibration_error as calibration_error

_HOMES = {
    "Batches": "training._batches",
    "steps_per_call": "training._batches",
    "steps_per_epoch": "training._batches",
    "accuracy": "training._scores",
    "calibration_error": "training._scores",
    "Checkpoints": "training._checkpoints",
    "balanced": "training._labels",
    "layer_list": "_compat",
    "compiler_flags": "_compiler",
    "compiler_flags_in_force": "_compiler",
    "set_compiler_flags": "_compiler",
    "is_address": "_locks",
    "locked": "_locks",
    "ProcessLost": "training._processes",
    "after_first": "training._processes",
    "by_first": "training._processes",
    "gathered": "training._processes",
    "held_by_first": "training._processes",
    "is_first": "training._processes",
    "start": "training._processes",
    "watched": "training._processes",
    "Progress": "training._progress",
    "Records": "training._records",
    "local_file": "models._torch_weights",
    "did_you_mean": "losses._checks",
    "DEFAULT_SOLVER": "losses._solvers",
    "by_products": "losses._polar",
    "by_svd": "losses._polar",
    "tolerance": "losses._polar",
    "Unsaid": "losses._metrics",
    "for_cpu": "losses._resolve",
    "spelled": "losses._metrics",
    "terms": "losses._metrics",
    "KERNELS": "losses._mmd",
    "as_network": "adapters",
    "auto_ratio": "training._auto_coef",
    "step_body": "training._step",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"kd2m_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
