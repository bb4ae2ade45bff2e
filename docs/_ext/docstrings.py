r"""Docstrings for the eye: what a terminal shows as plain text becomes LaTeX, links and calls.

A docstring keeps formulas that a terminal can show, such as ``W2^2 = min_P sum_ij ...``. Here
stands how a page sets them. A formula that no docstring has any more is a warning.
"""

import inspect
import re

from flax import nnx
from sphinx.application import Sphinx
from sphinx.util import logging

FORMULAS = {
    "W2^2 = min_P sum_ij P_ij ||z_s,i - z_t,j||^2": (
        r"W_2^2 = \min_{P} \sum_{ij} P_{ij} \, \|z_i^S - z_j^T\|^2"
    ),
    "CW2^2 = 1/K sum_y W2^2(P_S(Z|Y=y), P_T(Z|Y=y))": (
        r"CW_2^2 = \frac1K \sum_y W_2^2\big(P_S(Z \mid Y=y),\, P_T(Z \mid Y=y)\big)"
    ),
    "JW2^2 = min_P sum_ij P_ij (||z_s,i - z_t,j||^2 + beta L(h_s,i, h_t,j))": (
        r"JW_2^2 = \min_{P} \sum_{ij} P_{ij} \left(\|z_i^S - z_j^T\|^2"
        r" + \beta \, \mathcal L(h_i^S, h_j^T)\right)"
    ),
    "GW2^2 = min_P sum_ijkl (D^S_ik - D^T_jl)^2 P_ij P_kl": (
        r"GW_2^2 = \min_{P} \sum_{ijkl} (D^S_{ik} - D^T_{jl})^2 \, P_{ij} P_{kl}"
    ),
    "SW2^2 = 1/L sum_l W2^2(<theta_l, z_s>, <theta_l, z_t>)": (
        r"SW_2^2 = \frac1L \sum_l W_2^2\big(\langle\theta_l, z^S\rangle,"
        r" \langle\theta_l, z^T\rangle\big)"
    ),
    "W2^2 = ||mu_S - mu_T||^2 + Tr(S_S + S_T - 2 (S_S^1/2 S_T S_S^1/2)^1/2)": (
        r"W_2^2 = \|\mu_S - \mu_T\|^2 + \operatorname{Tr}\left(\Sigma_S + \Sigma_T"
        r" - 2\,(\Sigma_S^{1/2} \Sigma_T \Sigma_S^{1/2})^{1/2}\right)"
    ),
    "CW2^2 = 1/K sum_y W2^2(N(mu_S,y, S_S,y), N(mu_T,y, S_T,y))": (
        r"CW_2^2 = \frac1K \sum_y W_2^2\big(\mathcal N(\mu_{S,y}, \Sigma_{S,y}),\,"
        r" \mathcal N(\mu_{T,y}, \Sigma_{T,y})\big)"
    ),
    (
        "KL(P || Q) = 1/2 (Tr(S_Q^-1 S_P) + (mu_Q - mu_P)^T S_Q^-1 (mu_Q - mu_P) - d"
        " + log det S_Q - log det S_P)"
    ): (
        r"KL(P \,\|\, Q) = \tfrac12 \left(\operatorname{Tr}(\Sigma_Q^{-1} \Sigma_P)"
        r" + (\mu_Q - \mu_P)^\top \Sigma_Q^{-1} (\mu_Q - \mu_P) - d"
        r" + \log\det \Sigma_Q - \log\det \Sigma_P\right)"
    ),
    "1/K sum_y KL(N(mu_S,y, S_S,y) || N(mu_T,y, S_T,y))": (
        r"\frac1K \sum_y KL\big(\mathcal N(\mu_{S,y}, \Sigma_{S,y}) \,\|\,"
        r" \mathcal N(\mu_{T,y}, \Sigma_{T,y})\big)"
    ),
    "MMD^2 = mean k(s, s') + mean k(t, t') - 2 mean k(s, t)": (
        r"MMD^2 = \frac{1}{n^2}\sum_{ij} k(z_i^S, z_j^S) + \frac{1}{m^2}\sum_{ij} k(z_i^T, z_j^T)"
        r" - \frac{2}{nm}\sum_{ij} k(z_i^S, z_j^T)"
    ),
    "1/K sum_y MMD^2(P_S(Z|Y=y), P_T(Z|Y=y))": (
        r"\frac1K \sum_y MMD^2\big(P_S(Z \mid Y=y),\, P_T(Z \mid Y=y)\big)"
    ),
    "T^2 / n sum_i KL(softmax(h_T,i / T) || softmax(h_S,i / T))": (
        r"\frac{T^2}{n} \sum_i KL\big(\operatorname{softmax}(h_i^T / T) \,\|\,"
        r" \operatorname{softmax}(h_i^S / T)\big)"
    ),
    "sum_stages 1/n sum_i MMD^2(C_S,i, C_T,i)": (
        r"\sum_{\text{stages}} \frac1n \sum_i MMD^2(C_{S,i}, C_{T,i})"
    ),
    "1/n sum_i (<P_i, C> + target_coef L_t,i)": (
        r"\frac1n \sum_i \big(\langle P_i, C\rangle + c \, L_{t,i}\big),"
        r" \quad c = \texttt{target\_coef}"
    ),
    "1/(n g^2) sum_images,cells (gamma ||mu_S - mu_T||^2 + ||sigma_S - sigma_T||^2)": (
        r"\frac{1}{n g^2} \sum_{\text{images, cells}} \left(\gamma \|\mu_S - \mu_T\|^2"
        r" + \|\sigma_S - \sigma_T\|^2\right)"
    ),
    "1/n sum_i ||z_s,i - z_t,i||^2": r"\frac1n \sum_i \|z_i^S - z_i^T\|^2",
    "min_Q ||X - Y Q||_F^2 = ||X||_F^2 + ||Y||_F^2 - 2 ||X^T Y||_*": (
        r"\min_Q \|X - Y Q\|_F^2 = \|X\|_F^2 + \|Y\|_F^2 - 2 \|X^\top Y\|_*"
    ),
    "||X X^T - Y Y^T||_F^2 = 1/n^2 sum_ij (<x_i, x_j> - <y_i, y_j>)^2": (
        r"\|X X^\top - Y Y^\top\|_F^2 = \frac{1}{n^2} \sum_{ij}"
        r" \big(\langle x_i, x_j\rangle - \langle y_i, y_j\rangle\big)^2"
    ),
    "1 - ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)": (
        r"1 - \frac{\|X^\top Y\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}"
    ),
    "1/L sum_l sum_k v_k |phi_S,l(t_k) - phi_T,l(t_k)|^2": (
        r"\frac1L \sum_l \sum_k v_k \, \big|\varphi_{S,l}(t_k) - \varphi_{T,l}(t_k)\big|^2"
    ),
    "phi_S,l(t) = 1/n sum_i exp(i t <theta_l, z_s,i> / s)": (
        r"\varphi_{S,l}(t) = \frac1n \sum_j \exp\big(i t \langle\theta_l, z_j^S\rangle / s\big)"
    ),
    "|R_S(loss) - R_T(loss)| <= W <= L2": r"|R_S(\ell) - R_T(\ell)| \le W \le L_2",
    "k(x, y) = exp(-||x - y||^2 / (2 bandwidth^2)) = <phi(x), phi(y)>": (
        r"k(x, y) = \exp\big(-\|x - y\|^2 / (2 \sigma^2)\big)"
        r" = \langle\varphi(x), \varphi(y)\rangle, \ \sigma = \texttt{bandwidth}"
    ),
    "gap = |mean_i h(z_s,i) - mean_i h(z_t,i)|": (
        r"\texttt{gap} = \Big|\frac1n \sum_i h(z_i^S) - \frac1n \sum_i h(z_i^T)\Big|"
    ),
    "h = (mean_i phi(z_s,i) - mean_i phi(z_t,i)) / MMD": (
        r"h = \frac{1}{MMD} \Big(\frac1n \sum_i \varphi(z_i^S) - \frac1n \sum_i \varphi(z_i^T)\Big)"
    ),
    "w = min_P sum_ij P_ij ||phi(z_s,i) - phi(z_t,j)||": (
        r"\texttt{w} = \min_P \sum_{ij} P_{ij} \, \|\varphi(z_i^S) - \varphi(z_j^T)\|"
    ),
    "l2 = (mean_i ||phi(z_s,i) - phi(z_t,i)||^2)^1/2": (
        r"\texttt{l2} = \Big(\frac1n \sum_i \|\varphi(z_i^S) - \varphi(z_i^T)\|^2\Big)^{1/2}"
    ),
    "C_ab = 1 - exp(-kappa (1 - CKA_ab))": (r"C_{ab} = 1 - \exp\big(-\kappa\,(1 - CKA_{ab})\big)"),
}

# What a docstring's references name, and the entry of references.bib.
CITES = {
    "Fernandes Montesuma, KD2M, GSI 2025": "fernandes2025kd2m",
    "Hinton, Vinyals & Dean": "hinton2015",
    "Huang & Wang": "huang2017",
    "Lohit & Jones": "lohit2022",
    "Lv, Yang & Li": "lv2024",
    "Lv et al.": "lv2024",
    "Romero et al.": "romero2015",
    "Gretton et al.": "gretton2012",
    "Szekely & Rizzo": "szekely2013",
    "Sejdinovic et al.": "sejdinovic2013",
    "Memoli": "memoli2011",
    "Peyre, Cuturi & Solomon": "peyre2016",
    "Vayer et al.": "vayer2019",
    "Rabin, Peyre, Delon & Bernot": "rabin2011",
    "Bonneel, Rabin, Peyre & Pfister": "bonneel2015",
    "Courty et al.": "courty2017",
    "Cuturi, NeurIPS 2013": "cuturi2013",
    "Feydy et al.": "feydy2019",
    "Balas et al.": "balas1991",
    "Xie et al.": "xie2019",
    "Dowson & Landau": "dowson1982",
    "Kornblith et al.": "kornblith2019similarity",
    "Redko, Habrard & Sebban": "redko2017",
    "Williams et al.": "williams2021shape",
    "Bhattarai et al.": "bhattarai2025geometry",
    "Tung & Mori": "tung2019similarity",
    "Kornblith, Norouzi, Lee & Hinton": "kornblith2019similarity",
    "Epps & Pulley": "epps1983test",
    "Balestriero & LeCun": "balestriero2025lejepa",
    "Sun et al.": "sun2024logit",
}

logger = logging.getLogger(__name__)
_used: set[str] = set()
_expected: set[str] = set()


def pattern(text: str) -> re.Pattern:
    """Match a text whose blanks may be line ends, and what stands before it in its paragraph."""
    return re.compile(r"\s+".join(re.escape(word) for word in text.split()))


def set_formulas(doc: str) -> str:
    """Put LaTeX in the place of formulas: in a line of its own where one opens a paragraph."""
    for plain, latex in FORMULAS.items():
        literal = pattern(f"``{plain}``")
        opened = re.compile(rf"(?m)^\n{literal.pattern}[,;:]?\s*")
        doc, displayed = opened.subn(lambda _: f"\n.. math:: {latex}\n\n", doc, count=1)  # noqa: B023
        doc, inline = literal.subn(lambda _: f":math:`{latex}`", doc)  # noqa: B023
        if displayed or inline:
            _used.add(plain)
    return doc


def set_cites(doc: str) -> str:
    """Link what stands under References with the bibliography."""
    before, heading, references = doc.partition("\nReferences:")
    for words, key in CITES.items():
        references = pattern(words).sub(lambda m: f"{m[0]} :cite:`{key}`", references)  # noqa: B023
    return before + heading + references


def docstring(app: Sphinx, what, name, obj, options, lines: list[str]) -> None:
    """Change a docstring's lines, before napoleon reads its sections."""
    lines[:] = set_cites(set_formulas("\n".join(lines))).splitlines()


def signature(app: Sphinx, what, name, obj, options, given, returns):
    """Show an NNX module as it is called, and a dtype by its name."""
    if inspect.isclass(obj) and issubclass(obj, nnx.Module):
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        given = str(inspect.Signature(bare))
    if given:
        given = given.replace("<class 'jax.numpy.float32'>", "jax.numpy.float32")
    return given, returns


def expect(app: Sphinx, env, docnames: list[str]):
    """Expect every formula, in a build that reads every page."""
    if env.found_docs <= set(docnames):
        _expected.update(FORMULAS)


def check(app: Sphinx, env):
    """Name the formulas that no docstring has."""
    for plain in _expected - _used:
        logger.warning("no docstring has the formula %r of docs/_ext/docstrings.py", plain)


def setup(app: Sphinx):
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", docstring, priority=400)
    app.connect("autodoc-process-signature", signature)
    app.connect("env-before-read-docs", expect)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
