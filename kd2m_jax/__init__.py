"""Knowledge distillation by matching feature distributions, in JAX and Flax.

Names are resolved when they are first used, so ``from kd2m_jax import losses`` loads jax but
not flax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd2m_jax import losses as losses
    from kd2m_jax import models as models
    from kd2m_jax import theory as theory
    from kd2m_jax._capture import capture as capture
    from kd2m_jax._capture import layers as layers
    from kd2m_jax._equinox import from_equinox as from_equinox
    from kd2m_jax._outputs import Outputs as Outputs
    from kd2m_jax._projector import projected as projected
    from kd2m_jax.adapters import Network as Network
    from kd2m_jax.adapters import from_linen as from_linen
    from kd2m_jax.adapters import from_nnx as from_nnx
    from kd2m_jax.callbacks import EarlyStopping as EarlyStopping
    from kd2m_jax.callbacks import WeightAverage as WeightAverage
    from kd2m_jax.errors import CheckpointError as CheckpointError
    from kd2m_jax.errors import NonFiniteLoss as NonFiniteLoss
    from kd2m_jax.errors import Stopped as Stopped
    from kd2m_jax.losses import ClassStatistics as ClassStatistics
    from kd2m_jax.losses import class_statistics as class_statistics
    from kd2m_jax.teachers import Bank as Bank
    from kd2m_jax.teachers import ema_teacher as ema_teacher
    from kd2m_jax.teachers import ensemble as ensemble
    from kd2m_jax.training import FitResult as FitResult
    from kd2m_jax.training import TrainState as TrainState
    from kd2m_jax.training import fit as fit
    from kd2m_jax.training import init_state as init_state
    from kd2m_jax.training import make_eval_step as make_eval_step
    from kd2m_jax.training import make_train_step as make_train_step
    from kd2m_jax.training import outputs as outputs
    from kd2m_jax.training import pmap_step as pmap_step
    from kd2m_jax.training import predict as predict
    from kd2m_jax.training import restore as restore
    from kd2m_jax.training import shard_map_step as shard_map_step

__version__ = "0.1.0"
# Where the project is published: empty as long as it is nowhere. Nothing else names an address.
__url__ = ""

_MODULES = ("losses", "models", "theory")
_HOMES = {
    "Network": "adapters",
    "Outputs": "_outputs",
    "TrainState": "training",
    "CheckpointError": "errors",
    "EarlyStopping": "callbacks",
    "FitResult": "training",
    "NonFiniteLoss": "errors",
    "Stopped": "errors",
    "Bank": "teachers",
    "ClassStatistics": "losses",
    "WeightAverage": "callbacks",
    "capture": "_capture",
    "class_statistics": "losses",
    "ema_teacher": "teachers",
    "ensemble": "teachers",
    "fit": "training",
    "from_equinox": "_equinox",
    "from_linen": "adapters",
    "from_nnx": "adapters",
    "init_state": "training",
    "make_eval_step": "training",
    "make_train_step": "training",
    "layers": "_capture",
    "outputs": "training",
    "pmap_step": "training",
    "predict": "training",
    "projected": "_projector",
    "restore": "training",
    "shard_map_step": "training",
}
__all__ = sorted([*_MODULES, *_HOMES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
