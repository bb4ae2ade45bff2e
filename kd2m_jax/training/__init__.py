"""Training a student: `fit`, and the step that it runs. Names are resolved when first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd2m_jax.training._body import TrainState as TrainState
    from kd2m_jax.training._evaluation import make_eval_step as make_eval_step
    from kd2m_jax.training._fit import FitResult as FitResult
    from kd2m_jax.training._fit import fit as fit
    from kd2m_jax.training._parallel import pmap_step as pmap_step
    from kd2m_jax.training._parallel import shard_map_step as shard_map_step
    from kd2m_jax.training._predict import outputs as outputs
    from kd2m_jax.training._predict import predict as predict
    from kd2m_jax.training._restore import restore as restore
    from kd2m_jax.training._step import Step as Step
    from kd2m_jax.training._step import init_state as init_state
    from kd2m_jax.training._step import make_train_step as make_train_step

_HOMES = {
    "FitResult": "_fit",
    "fit": "_fit",
    "pmap_step": "_parallel",
    "shard_map_step": "_parallel",
    "outputs": "_predict",
    "predict": "_predict",
    "restore": "_restore",
    "Step": "_step",
    "TrainState": "_body",
    "init_state": "_step",
    "make_eval_step": "_evaluation",
    "make_train_step": "_step",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
