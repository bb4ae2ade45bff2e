# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %%
import importlib.metadata
import subprocess
import sys

# What pip installs on Google Colab: the path of a clone, or "git+" and the address it came from.
PACKAGE = "/content/kd2m_jax"

if "google.colab" in sys.modules:
    # Colab's own versions stay: its GPU plugin is of the same version as its JAX.
    kept = [f"{p}=={importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "flax", "numpy")]
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *kept, PACKAGE])
    if done.returncode:
        raise RuntimeError(
            f"pip cannot install {PACKAGE!r}: set PACKAGE above to the path of a clone on this "
            'machine, or to "git+" followed by the address of the repository you cloned'
        )

# %% [markdown]
# # Metrics playground: what each distance sees
#
# A student network is trained with `cross-entropy + λ · D`, where `D` compares two clouds of
# points: the features that the student and the teacher compute for one batch. Here the clouds
# live in the plane and belong to no network, so that one can look at them. For each metric we
# draw what it pairs, its gradient, and where that gradient takes the student's cloud in the end;
# then what its options do.
#
# Values are *squared* distances, in the squared unit of the axes (nats for KL).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse

from kd2m_jax import Outputs, losses

COLOURS = ["#0072B2", "#E69F00", "#009E73"]  # Okabe and Ito's, one a class
GREY = "#999999"
plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.titlesize": 10})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Two clouds with classes
#
# The teacher's three classes are well apart. The student's are closer together, and they lie
# elsewhere: its blue class sits between the teacher's blue and orange ones. Row `i` of both
# clouds is the same example, as in a batch. `logits` are what the two classifiers make of the
# examples: here each is a nearest-mean classifier on its own cloud.


# %%
def clouds(n_per_class=15, seed=0):
    """Student and teacher features `[n, 2]`, labels `[n]`."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), n_per_class)
    centres_t = np.array([[-3.0, -1.5], [3.0, -1.5], [0.0, 3.0]])
    centres_s = np.array([[0.5, -1.5], [2.0, 2.0], [-2.5, 1.0]])
    own = rng.normal(size=(len(labels), 2))
    z_t = centres_t[labels] + 0.7 * own
    z_s = centres_s[labels] + 0.5 * own + 0.4 * rng.normal(size=own.shape)
    return jnp.asarray(z_s, jnp.float32), jnp.asarray(z_t, jnp.float32), jnp.asarray(labels)


def nearest_mean(z, labels):
    """Logits `[n, 3]`: minus half the squared distances to the means of the classes."""
    means = jnp.stack([z[labels == y].mean(0) for y in range(3)])
    return -0.5 * ((z[:, None, :] - means[None, :, :]) ** 2).sum(-1)


z_s, z_t, labels = clouds()
h_s, h_t = nearest_mean(z_s, labels), nearest_mean(z_t, labels)


def scatter(axis, z_s, z_t, labels=labels, title=""):
    """Draw the teacher's points as discs, the student's as triangles, coloured by class."""
    for y, colour in enumerate(COLOURS):
        axis.scatter(*z_t[labels == y].T, c=colour, s=26, alpha=0.45, linewidth=0)
        style = {"marker": "^", "edgecolor": "k", "linewidth": 0.5, "zorder": 2}
        axis.scatter(*z_s[labels == y].T, c=colour, s=26, **style)
    axis.set_aspect("equal")
    axis.set_title(title)


def grid(rows, columns, size=(2.7, 2.5)):
    """Axes that share their limits, with labels at the edge."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), sharex=True, sharey=True
    )
    axes = np.atleast_2d(axes)
    for axis in axes[-1]:
        axis.set_xlabel("feature 1")
    for axis in axes[:, 0]:
        axis.set_ylabel("feature 2")
    return figure, axes


figure, axes = grid(1, 1, size=(4.6, 3.2))
scatter(axes[0, 0], z_s, z_t)
handles = [
    Line2D([], [], marker="o", color=GREY, linestyle="", label="teacher"),
    Line2D([], [], marker="^", color=GREY, markeredgecolor="k", linestyle="", label="student"),
    *(Line2D([], [], marker="s", color=c, linestyle="", label=f"class {y}")
      for y, c in enumerate(COLOURS)),
]  # fmt: skip
axes[0, 0].legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What each metric pairs
#
# `l2` pairs row `i` with row `i`: an example with itself. The empirical transport distances look
# for the coupling `P` that is cheapest, each under its own rule:
#
# - `w2`: `min_P Σ_ij P_ij ‖z_i^S − z_j^T‖²`, anyone with anyone;
# - `cw2`: the same within each class, then the mean over classes;
# - `jw2`: anyone with anyone, but a pair costs `β L(h_i^S, h_j^T)` more, the cross-entropy
#   between the two predictions.
#
# The Gaussian distances pair no points. They compare the mean and covariance of the clouds
# (`gaussian-w2`) or of each class (`gaussian-cw2`), drawn as ellipses of two standard deviations.
#
# `has_aux=True` returns the coupling along with the value.


# %%
def draw_coupling(axis, coupling, z_s, z_t, labels=labels, tint=1.0):
    """Draw one line per pair, the darker the more mass; black within a class, pink across."""
    coupling = np.asarray(coupling)
    for i, j in zip(*np.nonzero(coupling > 0.05 * coupling.max()), strict=True):
        colour = "k" if labels[i] == labels[j] else "#CC79A7"
        strength = tint * coupling[i, j] / coupling.max()
        axis.plot(*np.stack([z_s[i], z_t[j]]).T, c=colour, lw=0.9, alpha=strength, zorder=0)


def draw_ellipse(axis, z, colour, **style):
    """Mean and covariance of a cloud: the ellipse of two standard deviations."""
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True))
    angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
    width, height = 4 * np.sqrt(values[::-1])
    mean = np.asarray(z.mean(0))
    axis.add_patch(Ellipse(mean, width, height, angle=angle, fill=False, color=colour, **style))
    return mean


def within_class(coupling, labels=labels):
    """Return the share of the mass that stays in its class."""
    return float(jnp.sum(jnp.where(labels[:, None] == labels[None, :], coupling, 0)))


n = len(labels)
couplings = {
    "l2": (losses.l2(z_s, z_t), jnp.eye(n) / n),
    "w2": losses.w2(z_s, z_t, solver="exact", has_aux=True),
    "cw2": losses.cw2(z_s, z_t, labels, solver="exact", has_aux=True),
    "jw2, β = 5": losses.jw2(z_s, z_t, h_s, h_t, beta=5.0, solver="exact", has_aux=True),
}
figure, axes = grid(2, 3)
for axis, (name, (value, info)) in zip(axes.flat, couplings.items(), strict=False):
    coupling = getattr(info, "coupling", info)
    scatter(axis, z_s, z_t, title=f"{name}: {value:.2f}")
    draw_coupling(axis, coupling, z_s, z_t)
    print(f"{name:<11} {100 * within_class(coupling):5.1f}% of the mass stays in its class")

value = losses.gaussian_w2(z_s, z_t)
scatter(axes[1, 1], z_s, z_t, title=f"gaussian-w2: {value:.2f}")
ends = [
    draw_ellipse(axes[1, 1], z, "k", linestyle=s) for z, s in ((z_s, "-"), (z_t, "--"))
]  # the student's solid, the teacher's dashed
axes[1, 1].plot(*np.stack(ends).T, c="k")
value = losses.gaussian_cw2(z_s, z_t, labels)
scatter(axes[1, 2], z_s, z_t, title=f"gaussian-cw2: {value:.2f}")
for y, colour in enumerate(COLOURS):
    ends = [
        draw_ellipse(axes[1, 2], z[labels == y], colour, linestyle=s, linewidth=1.5)
        for z, s in ((z_s, "-"), (z_t, "--"))
    ]
    axes[1, 2].plot(*np.stack(ends).T, c=colour)
figure.tight_layout()
plt.show()

# %% [markdown]
# Black lines join points of one class, pink lines points of two. `w2` takes the nearest
# way, even if that gives a class of the student the place of another class of the teacher;
# `cw2` may not. `jw2` is between the two: it pays for unlike predictions, here so much that
# nearly all pairs agree. The value of `w2` is the smallest of the four, since `l2` and `cw2` are
# costs of couplings that `w2` could have chosen too (with classes of equal size), and `jw2` adds
# the cost of the predictions.
#
# **Try:** `beta=0.5`; a student whose classes lie where the teacher's do (`centres_s =
# centres_t`); classes of unequal size.
#
# ## The gradient
#
# What if the student had nothing else to do than to follow `D`? Then its cloud would flow along
# `dz_i/dt = −n ∂D/∂z_i`. The first step of that flow is the gradient. Arrows show it for all
# metrics at their defaults (`jw2` with β = 5), the predictions held fixed. Each panel scales its
# arrows to the same longest one, since values of different metrics are not comparable.


# %%
OPTIONS = {"jw2": {"beta": 5.0}}  # everything else at its default
STEP_SIZES = {"mmd-rbf": 2.0}  # its values end at 2, so its gradients are small


def distance(name, **options):
    """`z_s -> D` for a metric by name, everything else fixed."""
    metric = losses.get_metric(name, **{**OPTIONS.get(name, {}), **options})
    return lambda z: metric(Outputs(z, h_s), Outputs(z_t, h_t), labels)


def flow(name, steps=150):
    """Return the path of the student's cloud, `[steps + 1, n, 2]`: gradient descent on D alone."""
    gradient = jax.grad(distance(name))
    step_size = STEP_SIZES.get(name, 0.05)

    @jax.jit
    def run(z):
        def step(z, _):
            return z - step_size * n * gradient(z), z

        return jax.lax.scan(step, z, length=steps + 1)[1]

    return run(z_s)


def draw_arrows(axis, z, step):
    """Draw one arrow per point, the longest of length 1.5."""
    step = 1.5 * step / jnp.linalg.norm(step, axis=1).max()
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006, "color": "k"}
    axis.quiver(*z.T, *step.T, **style)


NAMES = ["l2", "w2", "cw2", "jw2", "gaussian-w2", "gaussian-cw2", "gaussian-kl", "mmd-rbf"]
paths = {name: flow(name) for name in NAMES}
figure, axes = grid(2, 4, size=(2.4, 2.3))
for axis, (name, path) in zip(axes.flat, paths.items(), strict=True):
    scatter(axis, z_s, z_t, title=name)
    draw_arrows(axis, z_s, path[1] - path[0])
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A gradient flow
#
# And where does it end? Grey lines are the paths of the points, triangles where they are after
# 150 steps.

# %%
figure, axes = grid(2, 4, size=(2.4, 2.3))
for axis, (name, path) in zip(axes.flat, paths.items(), strict=True):
    axis.plot(path[..., 0], path[..., 1], c=GREY, lw=0.5, zorder=0)
    scatter(axis, path[-1], z_t, title=name)
figure.tight_layout()
plt.show()

print("exact squared distances to the teacher\n")
print(f"{'after the flow of':<18}{'w2':>8}{'cw2':>8}")
for name, z in [("(before)", z_s), *((name, path[-1]) for name, path in paths.items())]:
    to_w2, _ = losses.w2(z, z_t, solver="exact", has_aux=True)
    to_cw2, _ = losses.cw2(z, z_t, labels, solver="exact", has_aux=True)
    print(f"{name:<18}{abs(to_w2):8.2f}{abs(to_cw2):8.2f}")  # abs: rounding gives -0.00

# %% [markdown]
# - `w2` arrives (0 is the teacher's cloud itself), but the student's classes end in the places of
#   others: `cw2` has grown. Once they are there, nothing in `w2` moves them back.
# - `l2`, `cw2` and `jw2` arrive with each class in its place.
# - `gaussian-w2` and `gaussian-kl` stop when mean and covariance of the whole clouds agree, which
#   they may do with the points elsewhere. `gaussian-cw2` also arrives but for what mean and
#   covariance of a class do not tell.
# - `mmd-rbf` compares the clouds through a Gaussian kernel. After 150 (larger) steps it has gone
#   two thirds of the way to the teacher's cloud (`w2` from 4.86 to 1.65), with classes in the
#   places of others as under `w2`.
#
# In training the features are not free to flow: they come out of a network, and the
# cross-entropy pulls as well, which tells the classes apart by itself. The flow shows what `D`
# alone asks for.
#
# **Try:** a student that starts with its classes in order (`centres_s = 0.3 * centres_t`): which
# metrics now arrive with each class in its place?
#
# ## ε: how blurred the coupling is
#
# Sinkhorn's algorithm adds an entropy to the transport problem, of strength `epsilon` relative to
# a lower bound of the cost. The larger it is, the faster the solver, and the more the mass
# spreads.

# %%
figure, axes = grid(1, 3)
print(f"{'epsilon':>8}{'w2':>9}{'iterations':>12}")
for axis, epsilon in zip(axes.flat, (0.01, 0.3, 3.0), strict=True):
    value, info = losses.w2(z_s, z_t, solver="sinkhorn", epsilon=epsilon, has_aux=True)
    scatter(axis, z_s, z_t, title=f"ε = {epsilon}: {value:.2f}")
    draw_coupling(axis, info.coupling, z_s, z_t, tint=0.6)
    print(f"{epsilon:>8}{value:>9.3f}{info.n_iters:>12}")
print(f"   exact{losses.w2(z_s, z_t, solver='exact', has_aux=True)[0]:>9.3f}")
print(f"debiased{losses.w2(z_s, z_t, epsilon=0.3, debiased=True):>9.3f}  (epsilon = 0.3)")
figure.tight_layout()
plt.show()

# %% [markdown]
# Lines below 5% of the strongest one are left out. The value `⟨P, C⟩` of a blurred coupling lies
# above the exact cost; with the default of 0.01 it is within about 1% of it. `debiased=True`
# subtracts what each cloud costs against itself: it is 0 when the clouds are equal, and here lies
# below the exact cost.
#
# **Try:** make the student equal to the teacher (`losses.w2(z_t, z_t)`) and compare the plain,
# the debiased and the exact value.
#
# ## β: how much the predictions count in `jw2`

# %%
figure, axes = grid(1, 3)
for axis, beta in zip(axes.flat, (0.5, 2.0, 5.0), strict=True):
    value, info = losses.jw2(z_s, z_t, h_s, h_t, beta=beta, solver="exact", has_aux=True)
    share = 100 * within_class(info.coupling)
    scatter(axis, z_s, z_t, title=f"β = {beta}: {value:.2f}, {share:.0f}% in class")
    draw_coupling(axis, info.coupling, z_s, z_t)
figure.tight_layout()
plt.show()

# %% [markdown]
# With β = 0 `jw2` is `w2`; the larger β, the more of the mass joins points with the same
# prediction. It needs no labels: where the teacher is unsure or wrong, `jw2` follows it, and
# `cw2` follows the labels. The right β depends on the scale of the features, for it is weighed
# against squared distances (the cross-entropy is in nats).
#
# ## The class mask
#
# `cw2` is one transport problem too, with an infinite cost between classes: its coupling is a
# matrix of blocks. Rows are the student's examples, columns the teacher's, sorted by class. All
# classes weigh the same, `1/K`, however many examples they have: here 24, 15 and 6.

# %%
# Nine examples of class 0 twice, and nine of class 2 not at all.
kept = jnp.concatenate([jnp.arange(9), jnp.arange(36)])
uneven = (z_s[kept], z_t[kept], labels[kept])
plans = {
    "w2": losses.w2(*uneven[:2], solver="sinkhorn", epsilon=0.3, has_aux=True)[1].coupling,
    "cw2": losses.cw2(*uneven, solver="sinkhorn", epsilon=0.3, has_aux=True)[1].coupling,
}
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.9), sharey=True)
for axis, (name, plan) in zip(axes, plans.items(), strict=True):
    image = axis.imshow(100 * plan, cmap="Greys", norm=PowerNorm(0.5, vmin=0, vmax=1.5))
    for edge in (24, 39):
        axis.axhline(edge - 0.5, color=COLOURS[0], lw=0.7)
        axis.axvline(edge - 0.5, color=COLOURS[0], lw=0.7)
    axis.set(title=f"{name}, ε = 0.3", xlabel="teacher's example")
axes[0].set_ylabel("student's example")
figure.colorbar(image, ax=axes, label="% of the mass")
plt.show()

# %% [markdown]
# `w2` has to move mass across classes if only because the student's classes lie elsewhere. In
# the blocks of `cw2` each pair of the smallest class carries the most: its 6 examples share as
# much mass as the 24 of the largest. With many classes and small batches a block is one example,
# and `cw2` is `l2`.
#
# ## Shrinkage: what keeps the Gaussian KL finite
#
# `gaussian-kl` inverts covariances. A feature that hardly varies (a dead unit, or a batch smaller
# than the number of features) makes them singular, so `shrinkage` adds `s·I` to both, `s` in
# units of the mean variance of the features (0.1 by default). Here the teacher's second feature is
# multiplied by 0.02, "nearly dead".

# %%
SHRINKAGES = (1e-4, 1e-3, 1e-2, 1e-1)
teachers = jnp.stack([z_t, z_t * jnp.array([1.0, 0.02])])
values = jnp.stack(
    [
        jax.vmap(lambda z, s=shrinkage: losses.gaussian_kl(z_s, z, shrinkage=s))(teachers)
        for shrinkage in SHRINKAGES
    ]
)
figure, axis = plt.subplots(figsize=(4.6, 2.8))
axis.loglog(SHRINKAGES, values[:, 1], "s-", c=COLOURS[1], label="second feature nearly dead")
axis.loglog(SHRINKAGES, values[:, 0], "o-", c=COLOURS[0], label="the clouds above")
axis.set(xlabel="shrinkage (relative to the mean variance)", ylabel="gaussian-kl (nats)")
axis.legend(frameon=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# For the clouds above, any shrinkage up to about 0.1 gives nearly the same value. Where the
# teacher has a nearly dead feature, the value depends on shrinkage all the way: it falls about as
# `1/s` from where `s` exceeds that feature's variance. A loss of hundreds of nats would drown the
# cross-entropy. `gaussian-w2` inverts nothing and
# needs none.
#
# ## Outliers
#
# One point of the student moves away to the right by r. How does each value grow?

# %%
DISTANCES = np.array([1.0, 2, 5, 10, 20, 50, 100], np.float32)
moved = jnp.stack([z_s.at[0, 0].add(r) for r in DISTANCES])
figure, axis = plt.subplots(figsize=(4.8, 3))
styles = [("w2", "-o"), ("gaussian-w2", "-^"), ("gaussian-kl", ":v")]
styles += [("mmd-rbf", "-D"), ("mmd-energy", "--x")]
palette = [*COLOURS, "#CC79A7", "#000000"]
for (name, style), colour in zip(styles, palette, strict=True):
    values = jax.jit(jax.vmap(distance(name)))(jnp.concatenate([z_s[None], moved]))
    axis.loglog(DISTANCES, values[1:] / values[0], style, c=colour, ms=4, label=name)
axis.set(xlabel="the point has moved by r", ylabel="value / value before")
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()
plt.show()

# %% [markdown]
# Squared distances grow like `r²/n` in the end: a single point may dominate the batch. The
# Gaussian distances first fall, since the student's cloud was too narrow for the teacher's.
# `mmd-energy`, whose kernel is a distance, hardly notices. `mmd-rbf` even *falls*: by default its
# bandwidth is the mean distance in the batch, which the outlier inflates, so that all other
# differences blur.
#
# **Try:** `distance("mmd-rbf", bandwidth=3.0)`; `distance("l2")`, which is a mean over pairs.
#
# ## Play
#
# One figure with everything to turn: the coupling (of the metrics that have one) and the
# gradient. Where widgets run, sliders follow; elsewhere change the call and run the cell again.
# Each new setting is compiled once, which takes a second or two.


# %%
def show(metric="w2", epsilon=0.01, beta=1.0, shrinkage=0.1, outlier=0.0):
    """Coupling, gradient and value of a metric."""
    everything = {"epsilon": epsilon, "beta": beta, "shrinkage": shrinkage}
    takes = {"w2": ["epsilon"], "cw2": ["epsilon"], "jw2": ["epsilon", "beta"]}
    takes["gaussian-kl"] = ["shrinkage"]
    options = {name: everything[name] for name in takes.get(metric, [])}
    solver = {"solver": "sinkhorn"} if "epsilon" in options else {}
    z = z_s.at[0, 0].add(outlier)
    value, gradient = jax.value_and_grad(distance(metric, **options, **solver))(z)
    _, axes = grid(1, 1, size=(5, 3.6))
    scatter(axes[0, 0], z, z_t)
    arguments = {"w2": (), "cw2": (labels,), "jw2": (h_s, h_t)}
    if metric in arguments:
        loss = losses.METRICS[metric].function
        _, info = loss(z, z_t, *arguments[metric], **options, **solver, has_aux=True)
        draw_coupling(axes[0, 0], info.coupling, z, z_t, tint=0.5)
    draw_arrows(axes[0, 0], z, -gradient)
    told = ", ".join(f"{name} = {option:g}" for name, option in options.items())
    axes[0, 0].set_title(f"{metric} = {value:.3f}" + (f"   ({told})" if told else ""))
    plt.show()


show("w2", epsilon=0.3, outlier=4.0)

# %%
try:
    from ipywidgets import FloatLogSlider, FloatSlider, interact
except ImportError:
    print("no ipywidgets here: call show(...) above instead")
else:
    late = {"continuous_update": False}
    interact(
        show,
        metric=["w2", *(name for name in NAMES if name != "w2")],
        epsilon=FloatLogSlider(0.3, min=-2, max=1, **late),
        beta=FloatSlider(1.0, min=0, max=10, **late),
        shrinkage=FloatLogSlider(0.1, min=-4, max=0, **late),
        outlier=FloatSlider(4.0, min=0, max=20, **late),
    )
