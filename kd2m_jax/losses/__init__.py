"""Distances between the feature distributions of a student and a teacher.

Pure functions of arrays, student first: jit-compiled, differentiable, the same in Flax, Equinox
and bare JAX code. A conditional loss (``c...``) is its marginal twin taken within each class.
``METRICS`` lists them with formula, needs and source.
"""

from kd2m_jax.losses._catalogue import METRICS as METRICS
from kd2m_jax.losses._catalogue import LossTerms as LossTerms
from kd2m_jax.losses._catalogue import Metric as Metric
from kd2m_jax.losses._catalogue import MetricInfo as MetricInfo
from kd2m_jax.losses._catalogue import distillation_loss as distillation_loss
from kd2m_jax.losses._catalogue import get_metric as get_metric
from kd2m_jax.losses._gaussian import gaussian_ckl as gaussian_ckl
from kd2m_jax.losses._gaussian import gaussian_cw2 as gaussian_cw2
from kd2m_jax.losses._gaussian import gaussian_kl as gaussian_kl
from kd2m_jax.losses._gaussian import gaussian_w2 as gaussian_w2
from kd2m_jax.losses._pointwise import l2 as l2
from kd2m_jax.losses._transport import TransportInfo as TransportInfo
from kd2m_jax.losses._transport import cw2 as cw2
from kd2m_jax.losses._transport import jw2 as jw2
from kd2m_jax.losses._transport import w2 as w2
