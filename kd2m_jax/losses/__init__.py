"""Distances between the feature distributions of a student and a teacher.

Pure functions of arrays, student first: jit-compiled, differentiable, the same in Flax, Equinox
and bare JAX code. A conditional loss (``c...``) is its marginal twin taken within each class.
``METRICS`` lists them with formula, needs and source.
"""

from kd2m_jax.losses._catalogue import METRICS as METRICS
from kd2m_jax.losses._catalogue import MetricInfo as MetricInfo
from kd2m_jax.losses._gaussian import gaussian_ckl as gaussian_ckl
from kd2m_jax.losses._gaussian import gaussian_cw2 as gaussian_cw2
from kd2m_jax.losses._gaussian import gaussian_kl as gaussian_kl
from kd2m_jax.losses._gaussian import gaussian_w2 as gaussian_w2
from kd2m_jax.losses._geometry import cka as cka
from kd2m_jax.losses._geometry import gram as gram
from kd2m_jax.losses._geometry import procrustes as procrustes
from kd2m_jax.losses._gromov import gw2 as gw2
from kd2m_jax.losses._logits import class_cost_matrix as class_cost_matrix
from kd2m_jax.losses._logits import kd as kd
from kd2m_jax.losses._logits import wkd_l as wkd_l
from kd2m_jax.losses._maps import nst as nst
from kd2m_jax.losses._maps import wkd_f as wkd_f
from kd2m_jax.losses._metrics import Metric as Metric
from kd2m_jax.losses._metrics import MetricSum as MetricSum
from kd2m_jax.losses._metrics import get_metric as get_metric
from kd2m_jax.losses._metrics import metric_sum as metric_sum
from kd2m_jax.losses._mmd import cmmd as cmmd
from kd2m_jax.losses._mmd import mmd as mmd
from kd2m_jax.losses._objective import LossTerms as LossTerms
from kd2m_jax.losses._objective import distillation_loss as distillation_loss
from kd2m_jax.losses._pointwise import l2 as l2
from kd2m_jax.losses._published import published as published
from kd2m_jax.losses._sliced import scf as scf
from kd2m_jax.losses._sliced import sw2 as sw2
from kd2m_jax.losses._solvers import TransportInfo as TransportInfo
from kd2m_jax.losses._statistics import ClassStatistics as ClassStatistics
from kd2m_jax.losses._statistics import class_statistics as class_statistics
from kd2m_jax.losses._transport import cw2 as cw2
from kd2m_jax.losses._transport import jw2 as jw2
from kd2m_jax.losses._transport import w2 as w2

# For pydoc and `import *`: what is imported here is what is public.
__all__ = [name for name in dir() if name[0] != "_"]  # pyright: ignore[reportUnsupportedDunderAll]
