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
# # Bring your own model, loop and teacher
#
# `kd2m_jax.losses` are pure functions of arrays, so they go into any training loop. Here the same
# distillation, three times by hand: in Flax NNX, in Flax Linen and in bare JAX; then by `fit`,
# which does the whole of it. Then two things that come up with one's own networks: features of
# unequal sizes, and a teacher from torch.
#
# The data are scikit-learn's handwritten digits: 1,797 real images of 8×8 pixels.

# %%
import pickle
import tempfile
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from kd2m_jax import fit, losses, models, projected

plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.titlesize": 10})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

x, labels = load_digits(return_X_y=True)
x = ((x - x.mean()) / x.std()).astype(np.float32).reshape(-1, 8, 8, 1)
split = train_test_split(x, labels.astype(np.int32), test_size=450, random_state=0, stratify=labels)
train, test = (split[0], split[2]), (split[1], split[3])

# %% [markdown]
# ## A teacher
#
# A network shows a loss its features beside its logits: it returns `(features, logits)`, or
# `Outputs`, which has the same two fields in front. Our `MLP` takes the last hidden layer for the
# features, here 32 of them.

# %%
result = fit(
    models.MLP((256, 32), 10, in_features=64, rngs=nnx.Rngs(0)), train, eval_data=test, epochs=20
)
teacher = result.student
teacher_accuracy = result.history[-1]["test_accuracy"]
print(f"teacher: {100 * teacher_accuracy:.1f}% of {len(test[0])} test images")

# %% [markdown]
# ## By hand, in Flax NNX
#
# The student's loss is cross-entropy plus λ times a distance between the two clouds of features.
# Here it is `gaussian_cw2`: a squared distance between Gaussians, one a class. λ has to suit the
# scale of the features: look at the size of both terms first. `stop_gradient` freezes the
# teacher; so does differentiating with respect to the student alone, as `value_and_grad` does
# here.

# %%
LAMBDA = 1e-2
EPOCHS, BATCH = 10, 128
curves, correct = {}, {}  # by loop: distances, and which test images it gets right


def batches(seed):
    """Shuffled batches of the training set, epoch after epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = rng.permutation(len(train[0]))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            yield rows, train[0][rows], train[1][rows]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def outputs(network, x):
    return network(x)


def is_right(logits):
    return np.argmax(logits, axis=1) == test[1]


student = models.MLP((16, 32), 10, in_features=64, rngs=nnx.Rngs(1))
optimizer = nnx.Optimizer(student, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def nnx_step(student, optimizer, teacher, x, labels):
    def loss_fn(student):
        ours, theirs = student(x), teacher(x)
        distance = losses.gaussian_cw2(ours.features, theirs.features, labels)
        return cross_entropy(ours.logits, labels) + LAMBDA * distance, distance

    (_, distance), grads = nnx.value_and_grad(loss_fn, has_aux=True)(student)
    optimizer.update(student, grads)
    return distance


curves["NNX"] = [nnx_step(student, optimizer, teacher, x, y) for _, x, y in batches(0)]
correct["NNX"] = is_right(outputs(student, test[0]).logits)

# %% [markdown]
# ## By hand, in Flax Linen
#
# The teacher is frozen and the images are not augmented, so its features can be computed once,
# before the loop.

# %%
teacher_features = np.asarray(outputs(teacher, train[0]).features)


class LinenStudent(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        features = nn.relu(nn.Dense(32)(hidden))
        return features, nn.Dense(10)(features)


module = LinenStudent()
variables = module.init(jax.random.key(1), train[0][:1])
adam = optax.adam(3e-3)


@jax.jit
def linen_step(variables, moments, x, labels, z_t):
    def loss_fn(variables):
        features, logits = module.apply(variables, x)
        distance = losses.gaussian_cw2(features, z_t, labels)
        return cross_entropy(logits, labels) + LAMBDA * distance, distance

    (_, distance), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables)
    updates, moments = adam.update(grads, moments)
    return optax.apply_updates(variables, updates), moments, distance


moments, curves["Linen"] = adam.init(variables), []
for rows, x, y in batches(0):
    variables, moments, distance = linen_step(variables, moments, x, y, teacher_features[rows])
    curves["Linen"].append(distance)
correct["Linen"] = is_right(jax.jit(module.apply)(variables, test[0])[1])

# %% [markdown]
# ## By hand, in bare JAX
#
# Parameters in a dict, and momentum written out.


# %%
def init(key, sizes=(64, 16, 32, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def forward(params, x):
    z = x.reshape(len(x), -1)
    for layer in params[:-1]:
        z = jax.nn.relu(z @ layer["w"] + layer["b"])
    return z, z @ params[-1]["w"] + params[-1]["b"]


@jax.jit
def bare_step(params, velocity, x, labels, z_t):
    def loss_fn(params):
        features, logits = forward(params, x)
        distance = losses.gaussian_cw2(features, z_t, labels)
        return cross_entropy(logits, labels) + LAMBDA * distance, distance

    (_, distance), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    velocity = jax.tree.map(lambda v, g: 0.9 * v - 0.02 * g, velocity, grads)
    return jax.tree.map(jnp.add, params, velocity), velocity, distance


params, curves["bare JAX"] = init(jax.random.key(1)), []
velocity = jax.tree.map(jnp.zeros_like, params)
for rows, x, y in batches(0):
    params, velocity, distance = bare_step(params, velocity, x, y, teacher_features[rows])
    curves["bare JAX"].append(distance)
correct["bare JAX"] = is_right(jax.jit(forward)(params, test[0])[1])

# %% [markdown]
# ## `fit`
#
# The same with evaluation, and with checkpoints, resume, several devices and a progress callback
# for the asking: see `help(fit)`. The student may be an NNX module, a Linen module or a `Network`
# of two functions; the metric any name in `losses.METRICS`.

# %%
common = {"eval_data": test, "epochs": EPOCHS, "batch_size": BATCH, "log_every": 1}
result = fit(
    models.MLP((16, 32), 10, in_features=64, rngs=nnx.Rngs(1)),
    train,
    teacher=teacher,
    metric="gaussian-cw2",
    coef=LAMBDA,
    optimizer=optax.adam(3e-3),
    **common,
)
curves["fit"] = [record["distillation_loss"] for record in result.history]
correct["fit"] = is_right(outputs(result.student, test[0]).logits)

figure, axis = plt.subplots(figsize=(5.2, 3))
styles = [("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", "-."), ("#000000", ":")]
for (name, curve), (colour, style) in zip(curves.items(), styles, strict=True):
    label = f"{name} ({100 * correct[name].mean():.1f}%)"
    axis.semilogy(np.arange(1, len(curve) + 1), curve, style, c=colour, label=label)
axis.set(xlabel="step", ylabel="gaussian-cw2 (squared distance)")
axis.legend(frameon=False, title="loop (test accuracy)")
figure.tight_layout()
plt.show()

# %% [markdown]
# Four ways to write one thing. They differ in their random initial weights; the bare one also in
# its optimizer, under which the distance falls more slowly. Do their accuracies differ? All are
# tested on the same 450 images, so compare them image by image: those that both get right, or
# wrong, cancel, and the standard error of the difference is that of the others.


# %%
def compare(name, other):
    """Points by which one is above the other on the same images, with its standard error."""
    difference = correct[name].astype(float) - correct[other]
    error = difference.std() / len(difference) ** 0.5
    print(f"{name:<16} minus {other}: {100 * difference.mean():+.1f} points, ± {100 * error:.1f}")


for name in ("Linen", "bare JAX", "fit"):
    compare(name, "NNX")

# %% [markdown]
# A difference of about one standard error is what chance does; one of more than two says that these
# two students differ, not why. The bare loop has another optimizer and other initial weights, and
# learns the labels sooner: which of the two does it takes several seeds of each to say.
#
# **Try:** another loss: `losses.cw2(ours.features, theirs.features, labels)`, or
# `losses.jw2(ours.features, theirs.features, ours.logits, theirs.logits)`.
#
# ## Features of unequal sizes
#
# A student with 12 features and a teacher with 32 cannot be compared point by point:

# %%
narrow = models.MLP((12,), 10, in_features=64, rngs=nnx.Rngs(1))
try:
    losses.cw2(narrow(x).features, teacher(x).features, y)
except ValueError as error:
    print(error)

# %% [markdown]
# Two remedies. `projected` trains a linear layer from 12 to 32 along with the student, and leaves
# it out of the result. `gw2` compares the distances *within* each cloud, so it needs none:
# `min_P Σ_ijkl P_ij P_kl (‖z_i^S − z_k^S‖ − ‖z_j^T − z_l^T‖)²`. Beside them the student alone.
# For `projected`, `coef="auto"` finds λ: it keeps the distance's part of the gradient at a tenth of
# the cross-entropy's.

# %%
common |= {"optimizer": optax.adam(3e-3)}
wide = projected(narrow, 32)
runs = {
    "alone": fit(narrow, train, **common),
    "projected, cw2": fit(wide, train, teacher=teacher, metric="cw2", coef="auto", **common),
    "gw2": fit(narrow, train, teacher=teacher, metric="gw2", coef=LAMBDA, **common),
}
for name, run in runs.items():
    correct[name] = is_right(outputs(run.student, test[0]).logits)
    features = run.student(x).features.shape[1]
    print(f"{name:<16} {100 * correct[name].mean():.1f}%, features of the result: {features}")
print()
for name in list(runs)[1:]:
    compare(name, "alone")

figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.7))
for axis, name in zip(axes, list(runs)[1:], strict=True):
    records = runs[name].history
    axis.semilogy([r["step"] for r in records], [r["distillation_loss"] for r in records])
    axis.set(xlabel="step", ylabel="squared distance", title=name)
figure.tight_layout()
plt.show()

# %% [markdown]
# The two values cannot be compared with each other: they measure different things. Neither student
# is above the one alone: `projected` is level with it, `gw2` more than two standard errors below.
# λ matters more here than the metric: with `coef=LAMBDA` instead of `"auto"` the projected student
# ended at 78.7%. Through a fresh projector the distance begins at some hundreds, so λ times it is
# several nats, against 2.3 of cross-entropy, and the student learns features first.
#
# ## A teacher from torch
#
# `models.load_torch_weights` reads a `.safetensors` file, or what `torch.save` wrote, without
# torch and without running what is pickled in it. It knows the ResNets of torchvision and timm by
# the names of their tensors; `"hf:timm/resnet34.tv_in1k"` downloads one.
#
# This notebook needs no torch and no download, so we make the file that you would bring: a ResNet
# of two stages, trained for a few epochs, its arrays in torch's names and layout (kernels
# `[out, in, height, width]`), in a `.pth` as `torch.save` writes it.


# %%
def torch_state_dict(resnet):
    """Return the arrays of one of our ResNets as torchvision names and lays them out."""
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for route, variable in nnx.iter_graph(resnet):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            if route[0] == "stages":
                route = (f"layer{route[1] + 1}", *route[2:])
            array = np.asarray(variable)
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            name = ".".join(map(str, (*route[:-1], leaves.get(route[-1], route[-1]))))
            state[name] = np.ascontiguousarray(array)
    return state


def write_pth(path, state):
    """Write a zip of the values, and of a pickle that says how torch makes tensors of them."""

    def value(thing):
        return pickle.dumps(thing, 2)[2:-1]  # without its frame

    dictionary = b"ccollections\nOrderedDict\n)R"
    pickled = b"\x80\x02" + dictionary + b"("
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, array) in enumerate(state.items()):
            key, strides = str(number), tuple(stride // 4 for stride in array.strides)
            storage = b"(" + value("storage") + b"ctorch\nFloatStorage\n"
            storage += value(key) + value("cpu") + value(array.size) + b"tQ"
            places = value(0) + value(array.shape) + value(strides) + value(False)
            pickled += value(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
            pickled += storage + places + dictionary + b"tR"
            archive.writestr(f"resnet/data/{key}", array.tobytes())
        archive.writestr("resnet/data.pkl", pickled + b"u.")
        archive.writestr("resnet/version", "3\n")


def small_resnet():
    widths = (16, 32, 64)  # of the stem and of each stage
    return models.ResNet(models.BasicBlock, (1, 1), widths, 10, in_channels=1, rngs=nnx.Rngs(0))


trained = fit(small_resnet(), train, epochs=4).student
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "resnet.pth"
write_pth(path, torch_state_dict(trained))
print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, for example")
for name, array in list(torch_state_dict(trained).items())[::10]:
    print(f"  {name:<30}{list(array.shape)}")

# %%
empty = nnx.eval_shape(small_resnet)  # its structure alone, without random weights
torch_teacher = models.load_torch_weights(empty, path)
torch_teacher.eval()  # with its running statistics, as a frozen teacher has to be
logits = outputs(torch_teacher, test[0]).logits
difference = abs(logits - outputs(trained, test[0]).logits).max()
print(f"largest difference of a logit from the network that was written: {difference}")

# %% [markdown]
# From here on it is a teacher like any other. This one has 64 features, so the student has, too.
# The metric is `gaussian-w2` for a change.

# %%
result = fit(
    models.MLP((16, 64), 10, in_features=64, rngs=nnx.Rngs(1)),
    train,
    teacher=torch_teacher,
    metric="gaussian-w2",
    coef=LAMBDA,
    **common,
)
scores = [r for r in result.history if "test_accuracy" in r]
figure, axis = plt.subplots(figsize=(4.6, 2.7))
axis.axhline(100 * is_right(logits).mean(), c="#0072B2", ls="--", label="teacher from the file")
epochs, percent = zip(*((r["epoch"], 100 * r["test_accuracy"]) for r in scores), strict=True)
axis.plot(epochs, percent, "o-", c="#009E73", label="distilled student")
axis.set(xlabel="epoch", ylabel="test accuracy (%)")
axis.legend(frameon=False)
figure.tight_layout()
plt.show()
folder.cleanup()

# %% [markdown]
# With your own file:
#
# ```python
# teacher = models.resnet34(1000, stem="imagenet", rngs=nnx.Rngs(0))
# models.load_torch_weights(teacher, "resnet34.pth")  # or .safetensors
# ```
#
# `replace_head=True` keeps a fresh classifier where the file's is for other classes. A network of
# another architecture needs no loader of ours: write it in Flax, fill its parameters as above,
# have it return `(features, logits)`, and hand it to `fit`.
