"""What our own experiments use, and what nobody is promised: names may change in any version.

Names are resolved when they are first used, so a caller that needs a lock does not load JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd2m_jax._batches import Batches as Batches
    from kd2m_jax._batches import steps_per_call as steps_per_call
    from kd2m_jax._batches import steps_per_epoch as steps_per_epoch
    from kd2m_jax._checkpoints import Checkpoints as Checkpoints
    from kd2m_jax._compiler import compiler_flags as compiler_flags
    from kd2m_jax._compiler import set_compiler_flags as set_compiler_flags
    from kd2m_jax._locks import locked as locked
    from kd2m_jax._processes import ProcessLost as ProcessLost
    from kd2m_jax._processes import after_first as after_first
    from kd2m_jax._processes import by_first as by_first
    from kd2m_jax._processes import gathered as gathered
    from kd2m_jax._processes import held_by_first as held_by_first
    from kd2m_jax._processes import is_first as is_first
    from kd2m_jax._processes import start as start
    from kd2m_jax._processes import watched as watched
    from kd2m_jax.losses._checks import did_you_mean as did_you_mean
    from kd2m_jax.losses._metrics import spelled as spelled
    from kd2m_jax.losses._mmd import KERNELS as KERNELS
    from kd2m_jax.models._torch_weights import local_file as local_file
    from kd2m_jax.networks import as_network as as_network
    from kd2m_jax.step import auto_ratio as auto_ratio
    from kd2m_jax.step import step_body as step_body

_HOMES = {
    "Batches": "_batches",
    "steps_per_call": "_batches",
    "steps_per_epoch": "_batches",
    "Checkpoints": "_checkpoints",
    "compiler_flags": "_compiler",
    "set_compiler_flags": "_compiler",
    "locked": "_locks",
    "ProcessLost": "_processes",
    "after_first": "_processes",
    "by_first": "_processes",
    "gathered": "_processes",
    "held_by_first": "_processes",
    "is_first": "_processes",
    "start": "_processes",
    "watched": "_processes",
    "did_you_mean": "losses._checks",
    "spelled": "losses._metrics",
    "KERNELS": "losses._mmd",
    "local_file": "models._torch_weights",
    "as_network": "networks",
    "auto_ratio": "step",
    "step_body": "step",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"kd2m_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
