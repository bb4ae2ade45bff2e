"""The catalogue, METRICS: every loss by its name, with what the rest of the library asks of it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from kd2m_jax.losses._gaussian import gaussian_ckl, gaussian_cw2, gaussian_kl, gaussian_w2
from kd2m_jax.losses._geometry import cka, gram, procrustes
from kd2m_jax.losses._gromov import gw2
from kd2m_jax.losses._logits import kd, wkd_l
from kd2m_jax.losses._maps import nst, wkd_f
from kd2m_jax.losses._mmd import KERNELS, cmmd, mmd
from kd2m_jax.losses._pointwise import l2
from kd2m_jax.losses._sliced import scf, sw2
from kd2m_jax.losses._transport import cw2, jw2, w2


class Published(NamedTuple):
    """How strongly a method's authors weighted it: ``task_coef CE + coef D``.

    Attributes:
      coef: lambda.
      task_coef: the weight of the cross-entropy.
      decay_from: the share of training after which coef falls to 0 by a cosine; 1: never.
    """

    coef: float
    task_coef: float = 1.0
    decay_from: float = 1.0


class MetricInfo(NamedTuple):
    """One line of the catalogue.

    Attributes:
      function: the public loss.
      formula: what it computes, in one line.
      source: where it comes from.
      options: what this name sets (a preset), and nobody sets again.
      published: the weights that its authors give, where they do (see `published`).
      projector: what a projector brings to the teacher's size first, in the experiments: "features"
        where they differ in size, of a loss that compares features; "maps", the last of them,
        always, where that is part of the method; None for a loss that compares unequal features.
      paired: whether row i of both sides must be the same example.

    Example:
      >>> info = METRICS["nst"]
      >>> info.function.__name__, info.needs, info.published.coef
      ('nst', ('maps',), 25.0)
      >>> info.description
      'Neuron selectivity transfer: the channels of an image as a sample of what neurons look at.'
    """

    function: Callable[..., Any]
    formula: str
    source: str
    options: dict[str, Any] = {}  # noqa: RUF012  (read only)
    published: Published | None = None
    projector: str | None = "features"
    paired: bool = False

    @property
    def description(self) -> str:
        """The first line of the loss's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def needs(self) -> tuple[str, ...]:
        """What it takes beyond features: some of "labels", "logits", "maps", "key"."""
        parameters = inspect.signature(self.function).parameters
        stems = dict.fromkeys(name.removesuffix("_s").removesuffix("_t") for name in parameters)
        return tuple(stem for stem in stems if stem in ("labels", "logits", "maps", "key"))


KD2M = "KD2M, Fernandes Montesuma, GSI 2025"
WKD = "WKD, Lv et al., NeurIPS 2024"
GRETTON = "Gretton et al., JMLR 2012"

METRICS: dict[str, MetricInfo] = {
    "w2": MetricInfo(w2, "min_P sum_ij P_ij |z_i^S - z_j^T|^2", KD2M),
    "cw2": MetricInfo(cw2, "1/K sum_y W2^2(P_S(Z|y), P_T(Z|y))", KD2M),
    "jw2": MetricInfo(jw2, "min_P sum_ij P_ij (|z_i^S - z_j^T|^2 + beta L(h_i^S, h_j^T))", KD2M),
    "lohit": MetricInfo(
        w2,
        "w2 by the inexact proximal point method",
        "Lohit & Jones, WACV 2022 (the solver; their cost and weight are not public)",
        {"solver": "ipot"},
    ),
    "gw2": MetricInfo(
        gw2,
        "min_P sum_ijkl P_ij P_kl (|z_i^S - z_k^S| - |z_j^T - z_l^T|)^2",
        "Memoli, Found. Comput. Math. 2011",
        projector=None,
    ),
    "sw2": MetricInfo(
        sw2, "mean over directions of w2 in one dimension", "Rabin et al., SSVM 2011"
    ),
    "scf": MetricInfo(
        scf,
        "mean over directions of sum_t v(t) |phi_S(t) - phi_T(t)|^2",
        "Epps & Pulley, Biometrika 1983; LeJEPA, arXiv 2511.08544 (one sample)",
    ),
    "gaussian-w2": MetricInfo(
        gaussian_w2, "|mu_S - mu_T|^2 + Tr(S_S + S_T - 2 (S_S^1/2 S_T S_S^1/2)^1/2)", KD2M
    ),
    "gaussian-cw2": MetricInfo(gaussian_cw2, "1/K sum_y gaussian_w2 within class y", KD2M),
    "gaussian-kl": MetricInfo(gaussian_kl, "KL(N(mu_S, S_S + s I) || N(mu_T, S_T + s I))", KD2M),
    "gaussian-ckl": MetricInfo(gaussian_ckl, "1/K sum_y gaussian_kl within class y", KD2M),
    **{
        f"mmd-{kernel}": MetricInfo(
            mmd, f"mean k(s, s') + k(t, t') - 2 k(s, t), k {kernel}", GRETTON, {"kernel": kernel}
        )
        for kernel in KERNELS
    },
    **{
        f"cmmd-{kernel}": MetricInfo(
            cmmd, f"1/K sum_y mmd-{kernel} within class y", GRETTON, {"kernel": kernel}
        )
        for kernel in KERNELS
    },
    "procrustes": MetricInfo(
        procrustes,
        "|X|^2 + |Y|^2 - 2 |X^T Y|_*, rows centred, by sqrt(n)",
        "Williams et al., NeurIPS 2021; Bhattarai et al., arXiv 2509.25253",
        projector=None,
        paired=True,
    ),
    "gram": MetricInfo(
        gram,
        "|X X^T - Y Y^T|^2, rows centred, by sqrt(n)",
        "Bhattarai et al., arXiv 2509.25253; Tung & Mori, ICCV 2019",
        projector=None,
        paired=True,
    ),
    "cka": MetricInfo(
        cka,
        "1 - |X^T Y|^2 / (|X^T X| |Y^T Y|), rows centred",
        "Kornblith et al., ICML 2019",
        projector=None,
        paired=True,
    ),
    "kd": MetricInfo(
        kd,
        "T^2 KL(softmax(h_T / T) || softmax(h_S / T))",
        "Hinton et al., arXiv 1503.02531",
        published=Published(0.9, task_coef=0.1),  # with T = 4, the common setting
        paired=True,
    ),
    "nst": MetricInfo(
        nst,
        "mean over images of mmd between channels",
        "Huang & Wang, arXiv 1707.01219",
        published=Published(25.0),
        paired=True,
    ),
    # For resnet32x4 -> resnet8x4 on CIFAR-100; T, gamma and g are the functions' defaults.
    "wkd-l": MetricInfo(
        wkd_l,
        "<P, C> over the other classes, plus c L_t = -c p_T(y) log p_S(y)",
        WKD,
        published=Published(600.0, decay_from=150 / 240),
        paired=True,
    ),
    "wkd-f": MetricInfo(
        wkd_f,
        "(gamma |mu_S - mu_T|^2 + |sigma_S - sigma_T|^2) by image and cell",
        WKD,
        published=Published(0.08, decay_from=150 / 240),
        projector="maps",
        paired=True,
    ),
    "l2": MetricInfo(
        l2, "1/n sum_i |z_i^S - z_i^T|^2", "FitNets, Romero et al., ICLR 2015", paired=True
    ),
}
